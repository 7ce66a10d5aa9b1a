"""Ask ONNX Runtime: python ask_onnxruntime.py JOBS.json ANSWERS.jsonl. Runs in ONNX Runtime's own environment.

The folder is converted by onnxruntime-genai's model builder.
"""

import subprocess
import sys
import tempfile
import time

import numpy as np
import onnxruntime_genai
from answering import answer


def ask(job: dict) -> dict:
    """The greedy continuation of a prompt, with the log-probability of each token."""
    with tempfile.TemporaryDirectory() as folder:
        build = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", job["path"], "-i", job["path"]]
        options = ["-o", folder, "-p", "fp32", "-e", "cpu", "-c", f"{folder}/cache"]
        built = subprocess.run([*build, *options], capture_output=True, text=True)
        if built.returncode:
            raise RuntimeError((built.stderr.strip().splitlines() or ["the model builder failed"])[-1])
        model = onnxruntime_genai.Model(folder)
        params = onnxruntime_genai.GeneratorParams(model)
        params.set_search_options(do_sample=False, max_length=256)
        generator = onnxruntime_genai.Generator(model, params)
        tokens, logprobs, start = [], [], time.perf_counter()
        generator.append_tokens(np.array([job["prompt"]], dtype=np.int32))
        while len(tokens) < job["count"]:
            logits = generator.get_logits()[0, -1].astype(np.float64)
            tokens.append(int(logits.argmax()))
            logprobs.append(float(-np.log(np.exp(logits - logits.max()).sum())))
            generator.append_tokens(np.array([tokens[-1:]], dtype=np.int32))
        seconds = time.perf_counter() - start
        del generator, params, model
    return {"tokens": tokens, "logprobs": logprobs, "seconds": seconds}


if __name__ == "__main__":
    answer(ask)
