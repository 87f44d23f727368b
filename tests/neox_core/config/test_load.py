"""Loading YAML: merging, paths, and errors that name the key and the way out."""

from __future__ import annotations

from pathlib import Path

import pytest

from neox_core.config import load_config, read_yaml
from neox_core.errors import ConfigError
from tests.paths import ROOT

TOY = ROOT / "configs" / "toy.yml"


def variant(folder: Path, extra: str) -> Path:
    """A file that includes the toy configuration and changes something."""
    path = folder / "run.yml"
    path.write_text(f"include: {TOY}\n{extra}\n")
    return path


def message(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ("trian: {steps: 5}", "unknown key 'trian': did you mean 'train'?"),
        ("train: {sequence_lenght: 5}", "unknown key 'train.sequence_lenght': did you mean 'train.sequence_length'?"),
        ("train: {optimizer: {learning_rte: 5}}", "unknown key 'train.optimizer.learning_rte'"),
        ("data: {sources: {arxiv: {wieght: 5}}}", "did you mean 'data.sources.arxiv.weight'?"),
        ("model: {xyzzy: 5}", "unknown key 'model.xyzzy'; known keys: family, num_layers"),
    ],
)
def test_unknown_key_names_the_nearest(extra: str, expected: str, tmp_path: Path) -> None:
    assert expected in message(variant(tmp_path, extra))


def test_a_misspelt_key_is_shown_before_the_one_that_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "run.yml"
    path.write_text(
        TOY.read_text()
        .replace("steps: 100", "stpes: 100")
        .replace("data_mixture.yml", str(TOY.parent / "data_mixture.yml"))
    )
    assert "unknown key 'train.stpes': did you mean 'train.steps'?" in message(path)
    assert "key 'train.steps' is missing" in message(path)


def test_missing_file(tmp_path: Path) -> None:
    assert message(tmp_path / "none.yml") == f"config file {tmp_path}/none.yml does not exist"


def test_missing_include(tmp_path: Path) -> None:
    path = tmp_path / "run.yml"
    path.write_text("include: other.yml\n")
    assert message(path) == f"config file {tmp_path}/other.yml does not exist"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("train: {steps: 5", "is not valid YAML"),
        ("- a\n- b\n", "must hold a mapping of sections, not list"),
        ("", "must hold a mapping of sections, not NoneType"),
        ("name: a\nseed: 1\nname: b\n", "key 'name' is given more than once"),
        ("train:\n  steps: 1\n  steps: 2\n", "line 2: key 'steps' is given more than once"),
    ],
)
def test_bad_yaml(content: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yml"
    path.write_text(content)
    assert expected in message(path)
    assert str(path) in message(path)


def test_bytes_that_are_not_text(tmp_path: Path) -> None:
    path = tmp_path / "run.yml"
    path.write_bytes(b"name: \xff\xfe\n")
    assert "cannot be read" in message(path)


def test_include_is_overridden_key_by_key(tmp_path: Path) -> None:
    config = load_config(
        variant(tmp_path, "train: {steps: 7}\ndata: {sources: {arxiv: {weight: 3}, extra: {weight: 1}}}")
    )
    toy = load_config(TOY)
    assert config.train.steps == 7
    assert config.train.optimizer == toy.train.optimizer
    assert config.data.sources["arxiv"].weight == 3
    assert set(config.data.sources) == {*toy.data.sources, "extra"}


def test_an_empty_section_over_an_included_one(tmp_path: Path) -> None:
    line = message(variant(tmp_path, "train: {optimizer: {}}"))
    assert "train.optimizer is {}, which changes nothing" in line
    assert line.endswith("sections are merged key by key, so leave it out, or set its keys one by one")


def test_an_include_is_relative_to_the_file_that_includes_it_and_other_paths_to_the_first(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared/all.yml").write_text(f"include: [{TOY}, paths.yml]\n")
    (tmp_path / "shared/paths.yml").write_text("workdir: runs\n")
    (tmp_path / "run.yml").write_text("include: shared/all.yml\n")
    assert load_config(tmp_path / "run.yml").workdir == tmp_path.resolve() / "runs"


@pytest.mark.parametrize("address", ["localhost:9000", "http://", "https:///", "ftp://x", "", "s3.example.org"])
def test_an_endpoint_without_its_scheme_or_host(tmp_path: Path, address: str) -> None:
    line = message(variant(tmp_path, f"storage: {{endpoint_url: '{address}'}}"))
    assert f"storage.endpoint_url: {address!r} is not an address such as https://s3.example.org:9000" in line


def test_later_includes_win_and_a_file_cannot_include_itself(tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_text("seed: 1\nname: a\n")
    (tmp_path / "b.yml").write_text("seed: 2\n")
    path = tmp_path / "run.yml"
    path.write_text(f"include: [{TOY}, a.yml, b.yml]\n")
    assert (load_config(path).seed, load_config(path).name) == (2, "a")
    (tmp_path / "a.yml").write_text("include: run.yml\n")
    assert "includes itself" in message(path)


def test_relative_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    config = load_config(variant(tmp_path, "workdir: here/runs\nbase_model: {path: /absolute/base}"))
    assert config.workdir == tmp_path.resolve() / "here/runs"
    assert config.base_model.path == Path("/absolute/base")
    assert load_config(TOY).tokenizer.model == ROOT / "data/tokenizers/demo-2048.model"


def test_a_wrong_type_names_the_value(tmp_path: Path) -> None:
    assert "train.steps is 'many'" in message(variant(tmp_path, "train: {steps: many}"))
    assert "train.steps is 0" in message(variant(tmp_path, "train: {steps: 0}"))
    assert "storage.url is 'http://x'" in message(variant(tmp_path, "storage: {url: 'http://x'}"))


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ("train: 5", "train is 5: Input should be a valid dictionary"),
        ("train: null", "train is None: Input should be a valid dictionary"),
        ("data: {sources: [arxiv]}", "data.sources is ['arxiv']: Input should be a valid dictionary"),
        ("data: {sources: {arxiv: 2}}", "data.sources.arxiv is 2: Input should be a valid dictionary"),
        ("data: {sources: {../text: {weight: 1}}}", "is '../text': String should match pattern"),
        ("data: {eval_sources: arxiv}", "data.eval_sources is 'arxiv': Input should be a valid tuple"),
        (
            "data: {sources: {arxiv: {weight: .inf}}}",
            "data.sources.arxiv.weight is inf: Input should be a finite number",
        ),
        ("name: a/b", "name is 'a/b': String should match pattern"),
        ("launch: {nodes: 1.5}", "launch.nodes is 1.5: Input should be a valid integer"),
        ("launch: {device: gpu}", "launch.device is 'gpu': Input should be 'auto', 'cuda' or 'cpu'"),
        ("train: {steps: true}", "train: steps is True: give a number, a name or a section, not yes or no"),
        ("seed: false", "seed is False: give a number"),
        ("train: {optimizer: {lr: .nan}}", "train.optimizer.lr is nan: Input should be a finite number"),
        ("train: {optimizer: {lr: fast}}", "train.optimizer.lr is 'fast': Input should be a valid number"),
        ("train: {optimizer: {betas: [0.9]}}", "key 'train.optimizer.betas.1' is missing: add it"),
        ("train: {optimizer: {betas: [0.9, 1.0]}}", "train.optimizer.betas.1 is 1.0: Input should be less than 1"),
        ("workdir: null", "workdir is None: Input is not a valid path"),
        ("1: 2", "1 is 1: Keys should be strings"),
    ],
)
def test_wrong_values_are_named_in_one_line(extra: str, expected: str, tmp_path: Path) -> None:
    assert expected in message(variant(tmp_path, extra))


def test_numbers_may_be_written_as_yaml_1_1_reads_text(tmp_path: Path) -> None:
    """YAML 1.1 takes 1e-4, without a point, for a text."""
    assert load_config(variant(tmp_path, "train: {optimizer: {lr: 1e-4}}")).train.optimizer.lr == 1e-4


@pytest.mark.parametrize("include", ["5", "null", "{a: b}", "[1]"])
def test_include_of_another_kind(include: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yml"
    path.write_text(f"include: {include}\n")
    assert "give a file's name or a list of names" in message(path)


def test_read_yaml_leaves_values_alone(tmp_path: Path) -> None:
    path = tmp_path / "any.yml"
    path.write_text('{"a-b": [1, 2.5e-4, true, null], "c": {"d": x}} # flow style, as GPT-NeoX writes it\n')
    assert read_yaml(path) == {"a-b": [1, 2.5e-4, True, None], "c": {"d": "x"}}
