"""lm-evaluation-harness on exported models, offline: its prompts and few-shot texts, our data, scoring and records."""
