"""Which files and which declarations are taken for a licence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hf_layerprune.files.folders import check_target
from hf_layerprune.records.licences import DeclaredLicence, copy_licence, is_licence_file, is_licence_text


@pytest.mark.parametrize("name", [
    "LICENSE", "LICENCE.txt", "license.md", "LICENSES.html", "License.TXT", "LICENSE.Apache", "LICENSE-2.0", "LICENSE_CODE",
    "LICENSE AGREEMENT.pdf", "MODEL_LICENSE.pdf", "Model License.rst", "THIRD_PARTY_NOTICES.txt", "ThirdPartyNotices.txt",
    "NOTICE", "Notice.txt", "USE_POLICY.md", "USAGE_POLICY", "Acceptable-Use-Policy.txt", "COPYING", "COPYRIGHT.txt",
    "AcceptableUsePolicy.md",
])  # fmt: skip
def test_files_that_go_with_every_copy(name: str, tmp_path: Path) -> None:
    assert is_licence_file(name)
    for one in ("config.json", name):
        (tmp_path / one).write_text("{}")
    check_target(tmp_path, None, force=True)  # it is not taken for somebody's own


def test_which_of_them_is_the_licence() -> None:
    names = ["NOTICE", "USE_POLICY.md", "ThirdPartyLicenses.txt", "COPYRIGHT", "LICENSE.gguf"]
    licences = ["LICENSE", "licence.txt", "ModelLicense.txt", "Model License.pdf", "COPYING"]
    assert [name for name in names + licences if is_licence_text(name)] == licences


@pytest.mark.parametrize("name", [
    "LICENSE.key", "LICENSE.c", "LICENSE.gguf", "notice.safetensors", "license.json", "licensed.txt", "my-license.txt",
    "POLICY.md", "vocab.txt", "notes.txt",
])  # fmt: skip
def test_other_files(name: str) -> None:
    assert not is_licence_file(name)


@pytest.mark.parametrize(
    ("declared", "known", "title", "link"),
    [
        ({}, False, "unknown", None),
        ({"license": ""}, False, "unknown", None),
        ({"license": "other"}, False, "other", None),
        ({"license": "other", "license_link": "LICENSE"}, True, "other", "LICENSE"),
        ({"license": "mine"}, True, "mine", None),
        ({"license": "other", "license_name": "Mine"}, True, "Mine", None),
        ({"license": "", "license_name": "Mine"}, True, "Mine", None),
        ({"license": "MIT", "license_name": "Mine"}, True, "MIT License", "https://opensource.org/license/mit"),
        ({"license": "mit", "license_link": "LICENSE"}, True, "MIT License", "LICENSE"),
        ({"license": "other", "license_name": " Open_RAIL++ "}, True, " Open_RAIL++ ", None),
        ({"license": "openrail++"}, True, "an OpenRAIL licence", None),
        ({"license_name": "deepseek-community-license"}, True, "deepseek-community-license", None),  # not DeepSeek's
    ],
)
def test_what_a_base_declares(declared: dict[str, Any], known: bool, title: str, link: str | None) -> None:
    found = DeclaredLicence.from_base(declared)
    assert (found.known, found.title, found.link) == (known, title, link)


def test_identifiers_are_in_the_spelling_of_the_hub() -> None:
    for spelled in ("Apache 2.0", " apache_2.0 ", "Apache-2.0 License"):
        assert DeclaredLicence.from_base({"license": spelled}).id == "apache-2.0"
    assert DeclaredLicence.from_base({"license": "openrail++"}).id == "openrail++"  # not that of the row


def test_a_licence_is_copied_to_where_there_is_none(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for folder, names in ((source, ("LICENSE", "NOTICE", "notes.txt")), (target, ("NOTICE",))):
        folder.mkdir()
        for name in names:
            (folder / name).write_text(folder.name)
    (source / "LICENSES").mkdir()
    copy_licence(source, target)
    assert {path.name: path.read_text() for path in target.iterdir()} == {"LICENSE": "source", "NOTICE": "target"}
