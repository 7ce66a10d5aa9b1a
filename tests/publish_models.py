"""Small models to publish, pruned from a base on the stand-in Hub."""

from __future__ import annotations

from pathlib import Path

from tests.hub_repo import Repo
from tests.hub_server import HubServer

CARD = "---\nlicense: mit\nlanguage: en\n---\n# The base\n"


def base_on_hub(hub: HubServer, place: Path, name: str = "org/base") -> Path:
    """Serve a tiny llama with a tokenizer, in several weight files."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from tests.tiny_models import tiny_model

    folder = place / name.replace("/", "-")
    if not folder.exists():
        tiny_model("llama").save_pretrained(folder, max_shard_size="100KB")
        words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(128)}, unk_token="w0"))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w2", pad_token="w0")
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(CARD)
        (folder / "LICENSE").write_text("The MIT License\n")
    hub.repos[name] = Repo(folder)
    return folder


def pruned_from_hub(hub: HubServer, place: Path, name: str, drop: int = 2, **request: object) -> Path:
    """Prune the base on the Hub into a folder, with numbers."""
    from hf_layerprune.stages.prune import PruneRequest, prune_to
    from tests.publish_records import measure_by_hand

    base_on_hub(hub, place)
    prune_to(PruneRequest(base="org/base", output=str(place / name), drop=drop, **request))
    measure_by_hand(place / name)
    return place / name
