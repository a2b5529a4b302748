"""Publishing and downloading against a server on this machine: whole, resumed, cut off, changed, hostile."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import small_bundle
from diffusion_convert.bundle.folder import BundleOptions, bundle_folder
from diffusion_convert.hub.download import download
from diffusion_convert.hub.publish import planned_upload, publish
from diffusion_runtime.atomic import WORK_FOLDER, locked
from diffusion_runtime.bundle import manifest
from diffusion_runtime.bundle.integrity import check_files
from diffusion_runtime.errors import HubError, InputError, PackageError, StorageError
from diffusion_runtime.zips import pack
from hub_server import Hub, serving

REPO = "maker/model"
TOKEN = "hf_test"  # noqa: S105  no secret: the server here takes any


@pytest.fixture(autouse=True)
def without_xet(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain protocol: the server here does not speak Xet. No waiting between tries."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("time.sleep", lambda _: None)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = small_bundle.write_bundle(tmp_path_factory.mktemp("hub") / "out")
    bundle_folder(folder, BundleOptions(zips=True, card=False))
    return folder


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving(Hub()) as running:
        yield running


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def published(hub: Hub, bundle: Path) -> Hub:
    hub.exists = True
    hub.files = contents(bundle)
    hub.commits = ["first"]
    return hub


def test_upload_is_private_whole_and_ends_with_the_card(hub: Hub, bundle: Path) -> None:
    publish(bundle, REPO, endpoint=hub.endpoint, token=TOKEN)
    assert hub.private is True
    assert hub.files == contents(bundle)
    assert hub.commits[-1] == "Add the model card"
    assert "Add original/compiled" in hub.commits


def test_what_is_there_is_not_sent_again(hub: Hub, bundle: Path) -> None:
    hub.fail_uploads_after = 1
    with pytest.raises(HubError, match=r"maker/model: upload failed"):
        publish(bundle, REPO, endpoint=hub.endpoint, token=TOKEN)
    sent, before = set(hub.objects), len(hub.requests)
    assert sent
    hub.fail_uploads_after = None
    publish(bundle, REPO, endpoint=hub.endpoint, token=TOKEN)
    assert hub.files == contents(bundle)
    assert {request for request in hub.requests[before:] if request.removeprefix("PUT /upload/") in sent} == set()
    before, commits = len(hub.requests), len(hub.commits)
    publish(bundle, REPO, endpoint=hub.endpoint, token=TOKEN)
    assert [request for request in hub.requests[before:] if request.startswith("PUT")] == []
    assert len(hub.commits) == commits


def test_dry_run_lists_files_and_neither_writes_nor_asks_a_server(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(bundle, folder, ignore=shutil.ignore_patterns("README.md"))
    before = contents(folder)
    planned = planned_upload(folder, REPO)
    assert planned.private
    assert "original/compiled/Unet.mlmodelc/model.mil" in planned.files
    assert "README.md" in planned.files
    assert planned.size_bytes == sum(len(data) for data in before.values()) + len(planned.card)
    assert contents(folder) == before


def test_models_that_were_never_verified_are_published_only_on_demand(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(bundle, folder, ignore=shutil.ignore_patterns("*.zip"))  # they hold the manifest as it was
    compiled = folder / "original" / "compiled"
    made = manifest.read(compiled)
    unet = made.components["unet"].model_copy(update={"psnr_db": {}})
    manifest.write(made.model_copy(update={"components": {**made.components, "unet": unet}}), compiled)
    with pytest.raises(InputError, match=r"not verified: original/compiled unet; .* --unverified"):
        planned_upload(folder, REPO)
    assert "original/compiled/manifest.json" in planned_upload(folder, REPO, unverified=True).files


def test_a_folder_that_another_process_writes_to_is_not_published(hub: Hub, bundle: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bundle, tmp_path / "out")
    with locked(folder), pytest.raises(StorageError, match=r"out: is being written by process \d+"):
        publish(folder, REPO, endpoint=hub.endpoint, token=TOKEN)
    assert hub.requests == []
    publish(folder, REPO, endpoint=hub.endpoint, token=TOKEN)
    assert not (folder / WORK_FOLDER).exists()


@pytest.mark.parametrize("name", ["Unet.mlmodelc/model.mil", "vocab.json"])
def test_a_changed_file_is_not_published(name: str, hub: Hub, bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "copy")
    (tmp_path / "copy" / "original" / "compiled" / name).write_text("changed")
    with pytest.raises(PackageError, match=f"{name} has changed"):
        publish(tmp_path / "copy", REPO, endpoint=hub.endpoint, token=TOKEN)
    assert hub.requests == []


@pytest.mark.parametrize("damage", ["a byte", "cut", "empty", "of other models"])
def test_a_damaged_zip_is_not_published(damage: str, bundle: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bundle, tmp_path / "copy")
    path = min(folder.glob("*.zip"))
    data = bytearray(path.read_bytes())
    data[data.index(b"model.mil") + 60] ^= 1
    damaged = {"a byte": data, "cut": data[: len(data) // 2], "empty": bytearray()}
    path.write_bytes(damaged.get(damage, data))
    if damage == "of other models":
        pack(folder / "original" / "packages", path)
    with pytest.raises(PackageError, match=rf"{path.name}: [^\n]*: make it again with `coreml-sd bundle"):
        planned_upload(folder, REPO)
    bundle_folder(folder, BundleOptions(zips=True))
    assert path.read_bytes() == (bundle / path.name).read_bytes()
    planned_upload(folder, REPO)


@pytest.mark.parametrize(
    ("variant", "kind"), [("split_einsum_v2", "compiled"), ("original", "packages"), (None, "compiled")]
)
def test_only_the_variants_files_are_downloaded_and_checked(
    published: Hub, bundle: Path, tmp_path: Path, variant: str | None, kind: str
) -> None:
    path = download(REPO, tmp_path / "models", variant=variant, kind=kind, endpoint=published.endpoint)
    chosen = variant or "original"
    assert path == tmp_path / "models" / chosen / kind
    assert contents(path) == contents(bundle / chosen / kind)
    check_files(manifest.read(path), path)
    got = [request.split("/resolve/")[1].split("/", 1) for request in published.requests if "/resolve/" in request]
    assert all(name.startswith(f"{chosen}/{kind}/") for _, name in got)
    assert {commit for commit, _ in got} == {published.commit}, "every file is of the revision resolved first"
    assert [item.name for item in (tmp_path / "models").iterdir()] == [chosen]


def test_a_zip_is_taken_and_unpacked_where_there_is_no_folder(published: Hub, bundle: Path, tmp_path: Path) -> None:
    published.files = {name: data for name, data in published.files.items() if "/" not in name}
    path = download(REPO, tmp_path, variant="split_einsum_v2", endpoint=published.endpoint)
    assert contents(path) == contents(bundle / "split_einsum_v2" / "compiled")


WEIGHTS = "original/compiled/Unet.mlmodelc/weights/weight.bin"
TEXT = "original/compiled/Unet.mlmodelc/model.mil"


@pytest.mark.parametrize("name", [WEIGHTS, TEXT])
def test_a_truncated_download_is_refused_and_goes_on_later(published: Hub, tmp_path: Path, name: str) -> None:
    published.truncate = name
    with pytest.raises((HubError, PackageError)) as caught:
        download(REPO, tmp_path / "models", endpoint=published.endpoint)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [item.name for item in (tmp_path / "models").iterdir()] == [WORK_FOLDER]
    published.truncate = ""
    download(REPO, tmp_path / "models", endpoint=published.endpoint)
    assert (tmp_path / "models" / name).read_bytes() == published.files[name]


@pytest.mark.parametrize("name", [WEIGHTS, TEXT])
def test_a_server_that_is_busy_is_asked_again(published: Hub, bundle: Path, tmp_path: Path, name: str) -> None:
    published.busy = name
    path = download(REPO, tmp_path, endpoint=published.endpoint)
    assert contents(path) == contents(bundle / "original" / "compiled")
    assert sum(request == f"GET /{REPO}/resolve/{published.commit}/{name}" for request in published.requests) == 2


@pytest.mark.parametrize(
    ("refuse", "expected"),
    [
        ((403, {"X_Error_Code": "GatedRepo", "X_Error_Message": "Ask for access."}), "private or gated"),
        ((401, {}), r"not allowed \(HTTP 401\): log in"),
        ((403, {}), r"not allowed \(HTTP 403\): log in"),
        ((500, {}), "HTTP 500"),
        (None, "not the Hub's"),
    ],
)
def test_a_refusal_is_one_line_without_the_token(
    published: Hub,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    refuse: tuple[int, dict[str, str]] | None,
    expected: str,
) -> None:
    published.refuse, published.page = refuse, refuse is None
    with (
        caplog.at_level("DEBUG"),
        pytest.raises(HubError if "500" in expected else InputError, match=expected) as caught,
    ):
        download(REPO, tmp_path, endpoint=published.endpoint, token=TOKEN)
    assert "\n" not in str(caught.value)
    assert TOKEN not in str(caught.value) + caplog.text
    assert list(tmp_path.iterdir()) == []


def test_hidden_files_are_neither_published_nor_downloaded(hub: Hub, bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "copy")
    for name in (".env", "original/compiled/.DS_Store", "original/.cache/token", "notes.txt"):
        (tmp_path / "copy" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "copy" / name).touch()
    publish(tmp_path / "copy", REPO, endpoint=hub.endpoint, token=TOKEN)
    assert hub.files.keys() == contents(bundle).keys() | {"README.md"}
    hub.files["original/compiled/.hidden/file"] = b"x"
    path = download(REPO, tmp_path / "models", endpoint=hub.endpoint)
    assert contents(path) == contents(bundle / "original" / "compiled")


def test_the_card_names_the_repository_and_a_name_that_apps_will_not_find_is_noted(
    hub: Hub, bundle: Path, tmp_path: Path
) -> None:
    shutil.copytree(bundle, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").unlink(missing_ok=True)
    lines: list[str] = []
    publish(tmp_path / "copy", REPO, endpoint=hub.endpoint, token=TOKEN, report=lines.append)
    card = hub.files["README.md"].decode()
    assert f"coreml-sd download {REPO} --variant original" in card
    assert f'modelId: "{REPO}"' in card
    assert any("named like them: maker/coreml-tiny-diffusion-v1-4" in line for line in lines)
    assert planned_upload(bundle, "maker/coreml-tiny-diffusion-v1-4").notes == ()


@pytest.mark.parametrize("name", [WEIGHTS, TEXT])
def test_changed_content_is_refused(published: Hub, tmp_path: Path, name: str) -> None:
    published.corrupt = name
    with pytest.raises(PackageError, match="is damaged"):
        download(REPO, tmp_path / "models", endpoint=published.endpoint)
    assert not (tmp_path / "models" / "original").exists()


def test_a_repository_whose_files_do_not_fit_its_manifest_is_refused(published: Hub, tmp_path: Path) -> None:
    published.files[TEXT] = b"program(1.0)"
    with pytest.raises(PackageError, match=r"Unet\.mlmodelc/model\.mil has changed"):
        download(REPO, tmp_path / "models", endpoint=published.endpoint)
    assert not (tmp_path / "models" / "original").exists()


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "original/compiled/..\\evil"])
def test_a_name_that_leads_outside_is_refused(published: Hub, tmp_path: Path, name: str) -> None:
    published.evil_name = name
    with pytest.raises(PackageError, match="outside of the repository"):
        download(REPO, tmp_path / "models", endpoint=published.endpoint)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("repo", "options", "expected"),
    [
        (
            "maker/model",
            {"variant": "split_einsum", "kind": "packages"},
            r"has no packages of split_einsum \(found: original, ",
        ),
        ("maker/model", {"kind": "zips"}, "--kind 'zips'"),
        ("not a name", {}, "expected OWNER/NAME"),
        ("model", {}, "expected OWNER/NAME"),
        ("maker/modèle", {}, "expected OWNER/NAME"),
        ("../evil", {}, "expected OWNER/NAME"),
    ],
)
def test_what_cannot_be_asked_for_is_named(
    published: Hub, tmp_path: Path, repo: str, options: dict[str, str], expected: str
) -> None:
    with pytest.raises(InputError, match=expected):
        download(repo, tmp_path, endpoint=published.endpoint, **options)  # type: ignore[arg-type]


def test_no_repository_and_no_server_are_one_line(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such repository, or it is private"):
        download(REPO, tmp_path, endpoint=hub.endpoint)
    with pytest.raises(HubError, match="download failed: cannot reach the Hub") as caught:
        download(REPO, tmp_path, endpoint="http://127.0.0.1:9")
    assert "where it stopped" not in str(caught.value), "nothing began"
    assert "\n" not in str(caught.value)


def test_what_exists_is_left_alone(published: Hub, tmp_path: Path) -> None:
    (tmp_path / "original" / "compiled").mkdir(parents=True)
    with pytest.raises(InputError, match="exists already"):
        download(REPO, tmp_path, endpoint=published.endpoint)
