"""Ask vLLM: python ask_vllm.py JOBS.json ANSWERS.jsonl. Runs in vLLM's own environment."""

import gc
import os
import time

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "0"}

from answering import answer
from vllm import LLM, SamplingParams, TokensPrompt


def ask(job: dict) -> dict:
    """The greedy continuation of a prompt, with the log-probability of each token."""
    gc.collect()  # the model before
    model = LLM(
        job["path"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=1,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
    )
    sampling = SamplingParams(temperature=0, max_tokens=job["count"], logprobs=1, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    (result,) = model.generate([TokensPrompt(prompt_token_ids=job["prompt"])], sampling, use_tqdm=False)
    seconds = time.perf_counter() - start
    tokens = list(result.outputs[0].token_ids)
    logprobs = [row[token].logprob for token, row in zip(tokens, result.outputs[0].logprobs, strict=True)]
    return {"tokens": tokens, "logprobs": logprobs, "seconds": seconds}


if __name__ == "__main__":
    answer(ask)
