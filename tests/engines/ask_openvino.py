"""Ask OpenVINO through optimum: python ask_openvino.py JOBS.json ANSWERS.jsonl. Runs in OpenVINO's own environment."""

import time

import torch
from answering import answer
from optimum.intel import OVModelForCausalLM

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "INFERENCE_NUM_THREADS": "1"}


def ask(job: dict) -> dict:
    """The greedy continuation of a prompt, with the log-probability of each token."""
    model = OVModelForCausalLM.from_pretrained(job["path"], export=True, load_in_8bit=False, ov_config=EXACT)
    ids, logprobs, start = torch.tensor([job["prompt"]]), [], time.perf_counter()
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=job["count"],
        min_new_tokens=job["count"],
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = out.sequences[0, ids.shape[1] :].tolist()
    logprobs = [row[0].log_softmax(-1)[token].item() for row, token in zip(out.logits, tokens, strict=True)]
    return {"tokens": tokens, "logprobs": logprobs, "seconds": time.perf_counter() - start}


if __name__ == "__main__":
    answer(ask)
