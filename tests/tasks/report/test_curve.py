"""The loss as an image."""

from __future__ import annotations

import base64
import xml.etree.ElementTree as ElementTree

from tasks.report.curve import loss_image

SVG = "{http://www.w3.org/2000/svg}"


def drawn(image: str) -> ElementTree.Element:
    kind, _, content = image.partition(",")
    assert kind == "data:image/svg+xml;base64"
    return ElementTree.fromstring(base64.b64decode(content))


def test_losses_are_lines_within_the_axes() -> None:
    rows = [{"step": step, "train/loss": 9.0 - step} for step in range(1, 5)] + [{"step": 4, "validation/loss": 6.0}]
    image = loss_image(rows, steps=8)
    assert image is not None
    picture = drawn(image)
    training, validation = (line.get("points", "").split() for line in picture.iter(f"{SVG}polyline"))
    assert (len(training), len(validation)) == (4, 1)
    xs, ys = zip(*(map(float, point.split(",")) for point in training), strict=True)
    assert list(xs) == sorted(xs)
    assert list(ys) == sorted(ys)  # downwards, as the loss falls
    assert xs[-1] < 0.6 * float(picture.get("width", 0))  # half of the steps are done
    assert [text.text for text in picture.iter(f"{SVG}text")][-2:] == ["training", "validation"]


def test_a_long_training_is_no_large_image_and_nothing_is_none() -> None:
    image = loss_image([{"step": step, "train/loss": 2.0 + 1 / step} for step in range(1, 50_001)], steps=50_000)
    assert image is not None
    assert len(image) < 20_000
    assert next(drawn(image).iter(f"{SVG}polyline")).get("points", "").split()[-1].startswith("704.0,")
    assert loss_image([{"step": 0, "validation/loss": 9.0}], steps=5) is None
    assert loss_image([{"step": 1, "train/loss": 2.0}], steps=5) is not None
