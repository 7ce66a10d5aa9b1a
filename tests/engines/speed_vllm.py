"""How fast vLLM runs folders, in turns: python speed_vllm.py ROUNDS PREFILL DECODE FOLDER ... (in vLLM's environment).

Seconds are CPU time of the process, on one thread. Decoding is what a long answer takes beyond an answer of one token.
"""

import json
import os
import sys
import time

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "0"}

from vllm import LLM, SamplingParams, TokensPrompt


def seconds(model: LLM, prompt: list[int], count: int) -> float:
    """CPU time of a greedy answer."""
    sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
    start = time.process_time()
    model.generate([TokensPrompt(prompt_token_ids=prompt)], sampling, use_tqdm=False)
    return time.process_time() - start


def main(rounds: str, prefill: str, decode: str, *folders: str) -> None:
    """Load all, then time them in turns; a line of JSON for each."""
    prompt, more = [100 + 37 * (i % 1000) for i in range(int(prefill))], int(decode)
    options = {"enforce_eager": True, "max_num_seqs": 1, "skip_tokenizer_init": True, "enable_prefix_caching": False}
    length = len(prompt) + more
    models = {path: LLM(path, dtype="float32", max_model_len=length, **options) for path in folders}
    for model in models.values():
        seconds(model, prompt, 2)  # the first pass prepares kernels
    for _ in range(int(rounds)):
        for path, model in models.items():
            reading = seconds(model, prompt, 1)
            writing = seconds(model, prompt, more) - reading
            print(
                json.dumps({"path": path, "prefill": len(prompt) / reading, "decode": (more - 1) / writing}),
                flush=True,
            )


if __name__ == "__main__":
    main(*sys.argv[1:])
