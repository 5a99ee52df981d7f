"""manifest.py: what is and what is not the folder that was saved, with the digests of the files and without."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stable_rlhf.checkpoints import manifest
from stable_rlhf.checkpoints.manifest import Manifest, check

CONTENT = {"model.safetensors": b"0123456789", "state.json": b"{}"}


def saved(folder: Path, step: int = 4) -> Manifest:
    folder.mkdir(exist_ok=True)
    for name, content in CONTENT.items():
        (folder / name).write_bytes(content)
    return written(folder, Manifest.of(folder, step))


def written(folder: Path, made: Manifest) -> Manifest:
    (folder / "manifest.json").write_bytes(made.encoded())
    return made


def fault(folder: Path, hashed: bool) -> str:
    with pytest.raises(ValueError, match=r".") as raised:
        check(folder, hashed)
    return str(raised.value)


@pytest.mark.parametrize("hashed", [True, False])
def test_a_folder_as_it_was_saved_is_its_own_manifest(tmp_path: Path, hashed: bool) -> None:
    made = saved(tmp_path / "a")
    assert check(tmp_path / "a", hashed) == made
    assert made.length == 10 + 2


@pytest.mark.parametrize("hashed", [True, False])
@pytest.mark.parametrize(("content", "length"), [(b"012345678", 9), (b"0123456789a", 11), (b"", 0)])
def test_a_file_that_is_shorter_or_longer_is_named_with_both_lengths(
    tmp_path: Path, hashed: bool, content: bytes, length: int
) -> None:
    """Both ways, and the length comes before the digest: a file of a terabyte need not be read to be refused."""
    saved(tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").write_bytes(content)
    assert fault(tmp_path / "a", hashed) == f"model.safetensors has {length} bytes, but 10 were saved"


def test_digests_are_compared_where_they_are_asked_for_and_only_there(tmp_path: Path) -> None:
    made = saved(tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").write_bytes(b"0123456780")
    assert fault(tmp_path / "a", hashed=True) == "model.safetensors has changed since it was saved"
    assert check(tmp_path / "a", hashed=False) == made


@pytest.mark.parametrize("hashed", [True, False])
def test_a_link_to_the_same_content_is_not_a_plain_file(tmp_path: Path, hashed: bool) -> None:
    saved(tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").rename(tmp_path / "elsewhere")
    (tmp_path / "a" / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    assert fault(tmp_path / "a", hashed) == "'model.safetensors' is not a plain file"


CHANGED = "manifest.json has changed since it was saved"


@pytest.mark.parametrize("step", ["4", 4.0, True, None])
def test_a_step_that_is_not_a_whole_number_is_refused_though_the_digest_fits(tmp_path: Path, step: object) -> None:
    made = saved(tmp_path / "a")
    written(tmp_path / "a", Manifest(step, made.files))  # type: ignore[arg-type]
    assert fault(tmp_path / "a", hashed=False) == CHANGED


def test_a_length_that_is_not_a_whole_number_is_refused_though_the_digest_fits(tmp_path: Path) -> None:
    made = saved(tmp_path / "a")
    files = {name: (float(length), digest) for name, (length, digest) in made.files.items()}
    written(tmp_path / "a", Manifest(4, files))  # type: ignore[arg-type]
    assert fault(tmp_path / "a", hashed=False) == CHANGED


def test_a_folder_without_a_state_is_not_one_of_ours(tmp_path: Path) -> None:
    saved(tmp_path / "a")
    for name in ("state.json", "manifest.json"):
        (tmp_path / "a" / name).unlink()
    written(tmp_path / "a", Manifest.of(tmp_path / "a", 4))
    assert fault(tmp_path / "a", hashed=True) == CHANGED


def test_another_spelling_of_the_same_manifest_is_refused(tmp_path: Path) -> None:
    made = saved(tmp_path / "a")
    file = tmp_path / "a" / "manifest.json"
    file.write_text(json.dumps(json.loads(made.encoded())))
    assert fault(tmp_path / "a", hashed=False) == CHANGED


@pytest.mark.parametrize("version", [0, 1, 2, 3, 4, 5, 7])
def test_an_older_and_a_newer_format_are_named(tmp_path: Path, version: int) -> None:
    made = saved(tmp_path / "a")
    content = json.loads(made.encoded()) | {"version": version}
    (tmp_path / "a" / "manifest.json").write_text(json.dumps(content, indent=1))
    assert fault(tmp_path / "a", hashed=True) == f"it has format {version}, but this release reads format 6"


@pytest.mark.parametrize(("spare", "longer"), [(0, False), (-1, True)])
def test_a_manifest_is_read_up_to_its_longest_length_and_no_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spare: int, longer: bool
) -> None:
    made = saved(tmp_path / "a")
    monkeypatch.setattr(manifest, "LONGEST", len(made.encoded()) + spare)
    if longer:
        assert fault(tmp_path / "a", hashed=True) == f"manifest.json is longer than {manifest.LONGEST} bytes"
    else:
        assert check(tmp_path / "a") == made
