"""Quantise with llm-compressor: python quantise_llmcompressor.py FOLDER TARGET METHOD ROWS.jsonl PROMPT.

Runs in an environment of its own. METHOD is one of `METHODS`; ROWS has lines of `{"text": ...}`, for those that take data;
PROMPT is a list of token ids.
"""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

# Groups of 64, because rows of SmolLM2 have 576 numbers; the preset W4A16 has groups of 128.
_WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}
_FOUR_BITS = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": _WEIGHTS}}, "ignore": ["lm_head"]}
METHODS = {
    "RTN W4A16": lambda: QuantizationModifier(**_FOUR_BITS),
    "GPTQ W4A16": lambda: GPTQModifier(**_FOUR_BITS),
    "RTN W8A8": lambda: QuantizationModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"]),
}


def main(source: str, target: str, method: str, rows: str, prompt: str) -> None:
    """Quantise, save, reload; print the logits of the prompt, and whether they are the same after reloading, as JSON."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    texts = [json.loads(line)["text"] for line in Path(rows).read_text().splitlines()]
    data = Dataset.from_dict({"input_ids": [tokenizer(text)["input_ids"][:64] for text in texts]})
    needs = {"dataset": data, "num_calibration_samples": len(texts), "max_seq_length": 64}
    oneshot(model=model, recipe=METHODS[method](), **(needs if method.startswith("GPTQ") else {}))
    model.save_pretrained(target)
    ids = torch.tensor([json.loads(prompt)])
    with torch.inference_mode():
        ours = model.eval()(ids).logits[0]
        again = AutoModelForCausalLM.from_pretrained(target, dtype=torch.bfloat16).eval()(ids).logits[0]
    print(json.dumps({"same": torch.equal(ours, again), "logits": ours.float().tolist()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
