"""Makes what llamafactory_sft.yaml trains, a small model and sentences: no download.

python examples/tools/llamafactory_data.py
"""

import json
from pathlib import Path

import small

folder = Path("runs/small")
folder.mkdir(parents=True, exist_ok=True)
small.model().save_pretrained(folder)
small.tokenizer().save_pretrained(folder)
rows = [{"instruction": one[:30], "input": "", "output": one[30:]} for one in small.sentences()]
(folder / "small.json").write_text(json.dumps(rows), encoding="utf-8")
(folder / "dataset_info.json").write_text(json.dumps({"small": {"file_name": "small.json"}}), encoding="utf-8")
