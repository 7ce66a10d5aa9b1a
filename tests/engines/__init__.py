"""Pruned checkpoints in the engines that serve models: vLLM, llama.cpp, ONNX Runtime, OpenVINO.

    python -m tests.engines                  every engine; minutes each, and the network on the first run
    python -m tests.engines llama.cpp vllm   these two; the rows of the others stay

Each engine is installed from the package index into `.engines/NAME`, apart from the project's own environment. The models
(`models.py`) and what transformers answers on them are made once, in `.engines/models`. An engine gets token ids and must
continue them greedily as transformers does, with the same log-probabilities. The results are in `results.json`, and
docs/engines.md is made of them.
"""
