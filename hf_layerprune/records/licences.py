"""A table of what the licence of a base requires from the publisher of a pruned copy.

A pruned model is a modified copy, so the licence of its base applies. The rows summarise what the licence texts require
for such a copy; they are not legal advice, and every card links to the text. For a licence that is not in the table, the
card and `push` say that its conditions are not known here. A missing licence is always reported.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

_FILES = re.compile(r"(LICENSE|LICENCE|NOTICE|USE_POLICY)([._-].*)?", re.IGNORECASE)
NOTICE = "NOTICE"


@dataclass(frozen=True)
class Licence:
    """One row of the table.

    Args:
        title (`str`): The name of the licence.
        link (`str`, *optional*): A link to the text.
        duties (`tuple[str, ...]`): The conditions for publishing a modified copy, one sentence each.
        built_with (`str`, *optional*): A text that must be displayed.
        prefix (`str`, *optional*): The required start of the model's name.
        notice (`str`, *optional*): A sentence that the NOTICE file must contain.
        needs_text (`bool`): Whether a copy of the licence must be included.
        non_commercial (`bool`): Whether commercial use is forbidden.
        forbidden (`str`, *optional*): Why a modified copy may not be published at all.
    """

    title: str
    link: str | None = None
    duties: tuple[str, ...] = ()
    built_with: str | None = None
    prefix: str | None = None
    notice: str | None = None
    needs_text: bool = False
    non_commercial: bool = False
    forbidden: str | None = None


_COPY = "Pass a copy of the licence on with the model."
_CHANGES = "Say that the files were changed. This card does."
_RAIL = "Its use restrictions bind everyone who uses this model or what is made of it; pass them on."
_BY = "Name the authors of the base, link the licence, and say what was changed. This card does."
_NC = "No commercial use."
_META_MAU = "Services with more than 700 million monthly users need a licence of their own from Meta."


def _llama(version: str, *, name: str = "Llama", more: tuple[str, ...] = ()) -> Licence:
    """A row for a Llama community licence from version 3 on; these differ only in names."""
    called = f"{'Meta ' if version == '3' else ''}Llama {version}"
    words = "Built with Meta Llama 3" if version == "3" else "Built with Llama"
    page = {"3": "llama3/license", "4": "llama4/license"}.get(version, f"llama{version.replace('.', '_')}/license")
    return Licence(
        title=f"{called} Community License Agreement",
        link=f"https://www.llama.com/{page}/",
        duties=(
            f"Display “{words}” prominently on a page about the model.",
            f"Begin the model's name with “{name}”.",
            "Pass on the agreement and a NOTICE file with Meta's attribution.",
            "Keep to the Acceptable Use Policy, and hand it on.",
            _META_MAU,
            *more,
        ),
        built_with=words,
        prefix=name,
        notice=f"{called} is licensed under the {called} Community License, Copyright © Meta Platforms, Inc. "
        "All Rights Reserved.",
        needs_text=True,
    )


_EU = (
    "For the multimodal models of this release, the licence grants no rights to persons domiciled in, or companies "
    "with their principal place of business in, the European Union.",
)
_QWEN_NOTICE = "Qwen is licensed under the Qwen {} AGREEMENT, Copyright (c) Alibaba Cloud. All Rights Reserved."


def _rail(title: str, link: str | None) -> Licence:
    """A row for a licence with use restrictions."""
    return Licence(title, link, (_COPY, _CHANGES, _RAIL), needs_text=True)


# By the identifier that cards use: `license`, or `license_name` where `license` is `other`.
TABLE: dict[str, Licence] = {
    "apache-2.0": Licence(
        "Apache License 2.0", "https://www.apache.org/licenses/LICENSE-2.0",
        (_COPY, _CHANGES, "Keep the notices of the base, and its NOTICE file if it has one."),
    ),
    "mit": Licence(
        "MIT License", "https://opensource.org/license/mit", ("Pass on the copyright line and the licence text.",)
    ),
    "bsd-3-clause": Licence(
        "BSD 3-Clause License", "https://opensource.org/license/bsd-3-clause",
        ("Pass on the copyright line, the conditions and the disclaimer.", "Don't use the authors' names to endorse."),
    ),
    "cc0-1.0": Licence("CC0 1.0", "https://creativecommons.org/publicdomain/zero/1.0/"),
    "cc-by-4.0": Licence("CC BY 4.0", "https://creativecommons.org/licenses/by/4.0/", (_BY,)),
    "cc-by-sa-4.0": Licence(
        "CC BY-SA 4.0", "https://creativecommons.org/licenses/by-sa/4.0/",
        (_BY, "Publish what is made of it under the same licence."),
    ),
    "cc-by-nc-4.0": Licence(
        "CC BY-NC 4.0", "https://creativecommons.org/licenses/by-nc/4.0/", (_BY, _NC), non_commercial=True
    ),
    "cc-by-nc-sa-4.0": Licence(
        "CC BY-NC-SA 4.0", "https://creativecommons.org/licenses/by-nc-sa/4.0/",
        (_BY, _NC, "Publish what is made of it under the same licence."), non_commercial=True,
    ),
    "cc-by-nd-4.0": Licence(
        "CC BY-ND 4.0", "https://creativecommons.org/licenses/by-nd/4.0/",
        forbidden="it forbids sharing a changed copy, and a pruned model is one",
    ),
    "cc-by-nc-nd-4.0": Licence(
        "CC BY-NC-ND 4.0", "https://creativecommons.org/licenses/by-nc-nd/4.0/", (_NC,), non_commercial=True,
        forbidden="it forbids sharing a changed copy, and a pruned model is one",
    ),
    "llama2": Licence(
        "Llama 2 Community License Agreement", "https://ai.meta.com/llama/license/",
        ("Pass on the agreement and a NOTICE file with Meta's attribution.",
         "Keep to the Acceptable Use Policy, and hand it on.", _META_MAU,
         "Don't use it, or what it writes, to improve other large language models than Llama 2 and its derivatives."),
        notice="Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. "
        "All Rights Reserved.",
        needs_text=True,
    ),
    "llama3": _llama("3", name="Llama 3"),
    "llama3.1": _llama("3.1"),
    "llama3.2": _llama("3.2", more=_EU),
    "llama3.3": _llama("3.3"),
    "llama4": _llama("4", more=_EU),
    "gemma": Licence(
        "Gemma Terms of Use", "https://ai.google.dev/gemma/terms",
        ("Pass on a copy of the terms and a NOTICE file.", _CHANGES,
         "Bind whoever receives the model, by terms of your own, to the "
         "[use restrictions](https://ai.google.dev/gemma/prohibited_use_policy) of section 3.2."),
        notice="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
        needs_text=True,
    ),
    "tongyi-qianwen": Licence(
        "Tongyi Qianwen License Agreement", "https://github.com/QwenLM/Qwen/blob/main/Tongyi%20Qianwen%20LICENSE%20AGREEMENT",
        (_COPY, _CHANGES, "Pass on a NOTICE file with Alibaba Cloud's attribution.",
         "Products with more than 100 million monthly users need a licence of their own from Alibaba Cloud."),
        notice="Tongyi Qianwen is licensed under the Tongyi Qianwen LICENSE AGREEMENT, Copyright (c) Alibaba Cloud. "
        "All Rights Reserved.",
        needs_text=True,
    ),
    "qwen": Licence(
        "Qwen License Agreement", "https://huggingface.co/Qwen/Qwen2.5-72B-Instruct/blob/main/LICENSE",
        (_COPY, _CHANGES, "Pass on a NOTICE file with Alibaba Cloud's attribution.",
         "Display “Built with Qwen” or “Improved using Qwen” prominently.",
         "Products with more than 100 million monthly users need a licence of their own from Alibaba Cloud."),
        built_with="Built with Qwen", notice=_QWEN_NOTICE.format("LICENSE"), needs_text=True,
    ),
    "qwen-research": Licence(
        "Qwen Research License Agreement", "https://huggingface.co/Qwen/Qwen2.5-3B-Instruct/blob/main/LICENSE",
        (_NC + " Research and evaluation only.", _COPY, _CHANGES,
         "Pass on a NOTICE file with Alibaba Cloud's attribution.",
         "Display “Built with Qwen” or “Improved using Qwen” prominently."),
        built_with="Built with Qwen", notice=_QWEN_NOTICE.format("RESEARCH LICENSE"), needs_text=True,
        non_commercial=True,
    ),
    "deepseek": _rail(
        "DeepSeek License Agreement", "https://github.com/deepseek-ai/DeepSeek-LLM/blob/main/LICENSE-MODEL"
    ),
    "falcon-llm-license": Licence(
        "TII Falcon LLM License", "https://falconllm.tii.ae/falcon-terms-and-conditions.html",
        (_COPY, _CHANGES, "Keep to the Acceptable Use Policy, and hand it on.",
         "State that the model is built using Falcon LLM technology from the Technology Innovation Institute."),
        built_with="Built using Falcon LLM technology from the Technology Innovation Institute", needs_text=True,
    ),
    "bigscience-bloom-rail-1.0": _rail(
        "BigScience BLOOM RAIL 1.0", "https://huggingface.co/spaces/bigscience/license"
    ),
    "bigscience-openrail-m": _rail(
        "BigScience OpenRAIL-M", "https://www.licenses.ai/blog/2022/8/26/bigscience-open-rail-m-license"
    ),
    "bigcode-openrail-m": _rail(
        "BigCode OpenRAIL-M", "https://huggingface.co/spaces/bigcode/bigcode-model-license-agreement"
    ),
    "openrail": _rail("an OpenRAIL licence", None),
    "nvidia-open-model-license": Licence(
        "NVIDIA Open Model License", "https://www.nvidia.com/en-us/agreements/enterprise-software/nvidia-open-model-license/",
        (_COPY, "Pass on a NOTICE file with NVIDIA's attribution."),
        notice="Licensed by NVIDIA Corporation under the NVIDIA Open Model License", needs_text=True,
    ),
}  # fmt: skip
# Other names that occur in cards.
_ALIASES = {
    "tongyi-qianwen-research": "qwen-research",
    **dict.fromkeys(("falcon", "falcon2", "falcon-2", "falcon3"), "falcon-llm"),
    "openrail++": "openrail",
    "bigscience-openrail": "bigscience-openrail-m",
}


@dataclass(frozen=True)
class LicenceFound:
    """The licence of a base, as it declares it.

    Args:
        id (`str`, *optional*): `license` of the card, or `None` if the base declares none.
        name (`str`, *optional*): `license_name`.
        link (`str`, *optional*): `license_link`, or else the link in the table.
        row (`Licence`, *optional*): The row in the table, if any.
    """

    id: str | None = None
    name: str | None = None
    link: str | None = None
    row: Licence | None = None

    @classmethod
    def of(cls, base: dict[str, Any]) -> LicenceFound:
        """Look up the licence that `lineage.json` records for the base."""
        declared, name, link = (base.get(key) for key in ("license", "license_name", "license_link"))
        if not declared and name:
            declared = "other"
        if declared in (None, "", "unknown"):
            return cls()
        key = _key(name) if declared == "other" and name else _key(declared)
        row = _ROWS.get(_ALIASES.get(key, key))
        return cls(declared, name, link or (row.link if row else None), row)

    @property
    def known(self) -> bool:
        """Whether the base declares a licence at all."""
        return self.id is not None and (self.id != "other" or bool(self.name or self.link))

    @property
    def title(self) -> str:
        """The name to display."""
        return self.row.title if self.row else self.name or self.id or "unknown"


def _key(text: str) -> str:
    """A name in the spelling by which it is looked up: `Qwen LICENSE AGREEMENT` is `qwen`, `llama-3` is `llama3`."""
    key = re.sub(r"-licen[cs]e(-agreement)?$", "", re.sub(r"[\s_]+", "-", text.strip().lower()))
    return re.sub(r"^llama-(?=\d)", "llama", key)


_ROWS = {_key(name): row for name, row in TABLE.items()}


def is_licence_file(name: str) -> bool:
    """Whether a file of a model folder is a licence, notice or use policy, which every copy must include."""
    return _FILES.fullmatch(name) is not None
