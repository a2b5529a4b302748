"""`coreml-sd batch`: rows, seeds, results, what a kill leaves, workers that die, Ray."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from batches import Here, Make, pictures, results, without_time, write
from diffusion_runtime import images
from diffusion_runtime.batch import rows
from diffusion_runtime.batch.places import Folder, Storage
from diffusion_runtime.batch.run import Batch, identity, prepare, setups
from diffusion_runtime.batch.tasks import Answer, tasks_of
from diffusion_runtime.batch.worker import Setup, Worker
from diffusion_runtime.errors import DiffusionError, InputError, StorageError
from diffusion_runtime.loading import load_pipeline


@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".csv", ".parquet"])
def test_the_same_prompts_in_any_format_are_the_same_pictures(make: Make, tmp_path: Path, kind: str) -> None:
    table = [{"prompt": "a cat, black"}, {"prompt": "a dög"}]
    lines = make(write(tmp_path / f"prompts{kind}", table), tmp_path / "out")
    assert [(line["row"], line["input"], line["file"], line["seed"], line["flagged"]) for line in lines] == [
        (1, table[0], "000001.png", 0, False),
        (2, table[1], "000002.png", 1, False),
    ]
    assert all(line["seconds"] > 0 and line["error"] is None for line in lines)
    record = images.read_metadata(tmp_path / "out" / "000002.png")
    assert (record["prompt"], record["seed"], record["steps"]) == ("a dög", 1, 2)


@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".parquet"])
def test_a_row_says_its_own_options_in_any_spelling(make: Make, tmp_path: Path, kind: str) -> None:
    table: list[dict[str, Any]] = [
        {"prompt": "a", "num_inference_steps": 3, "guidance_scale": 2, "seed": 2**63 + 5, "scheduler": "ddim"},
        {"prompt": "b", "num_inference_steps": None, "guidance_scale": None, "seed": None, "scheduler": None},
    ]
    if kind == ".csv":
        table[1] = {"prompt": "b"}
    if kind == ".parquet":
        table[0]["seed"] = 5
    make(write(tmp_path / f"prompts{kind}", table), tmp_path / "out", seed=100)
    first, second = (images.read_metadata(tmp_path / "out" / f"00000{n}.png") for n in (1, 2))
    assert (first["steps"], first["guidance_scale"], first["scheduler"]) == (3, 2.0, "ddim")
    assert first["seed"] == table[0]["seed"]
    assert (second["steps"], second["seed"], second["scheduler"]) == (2, 101, "pndm")


def test_eta_by_row_and_for_all(make: Make, toy_folder: Path, tmp_path: Path) -> None:
    table: list[dict[str, Any]] = [{"prompt": "a", "eta": 0.6}, {"prompt": "a"}, {"prompt": "a", "eta": 2}]
    lines = make(write(tmp_path / "p.csv", table), tmp_path / "out", scheduler="ddim", eta=0.2)
    pipeline = load_pipeline(toy_folder, "torch", scheduler="ddim")
    for line, eta in zip(lines[:2], (0.6, 0.2), strict=True):
        made = pipeline("a", num_inference_steps=2, seed=line["seed"], eta=eta).images[0]
        path = tmp_path / "out" / line["file"]
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(made))
        assert images.read_metadata(path)["eta"] == eta
    assert lines[2]["error"] == "eta 2.0: expected a number, 0 to 1"


def test_whole_numbers_of_a_csv_with_gaps_are_whole(make: Make, tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("prompt,seed,steps\na,9007199254740993,3.0\nb,7.0,\nc,2.5,\n")  # pandas'
    first, second, third = make(tmp_path / "p.csv", tmp_path / "out")
    assert (first["seed"], second["seed"]) == (9007199254740993, 7)
    assert images.read_metadata(tmp_path / "out" / first["file"])["steps"] == 3
    assert third["error"] == "seed: got '2.5', expected a whole number"


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv_as_spreadsheets_write_it(tmp_path: Path, delimiter: str) -> None:
    lines = ("prompt,steps", '"a ""cat"", black; old\tone",3', '"two\r\nlines",4', ",", "last,")
    head, first, *others = (line.replace(",", delimiter) if "black" not in line else line for line in lines)
    first = first.removesuffix(",3") + f"{delimiter}3"
    (tmp_path / "p.csv").write_bytes(("\ufeff" + "\r\n".join([head, first, *others]) + "\r\n").encode())
    assert [(row.number, row.options, row.error) for row in rows.read(tmp_path / "p.csv")] == [
        (1, {"prompt": 'a "cat", black; old\tone', "steps": 3}, None),
        (2, {"prompt": "two\r\nlines", "steps": 4}, None),
        (3, {"prompt": "last"}, None),
    ]


def test_pictures_to_start_from_are_named_beside_the_table_or_stand_in_it(make: Make, tmp_path: Path) -> None:
    picture = Image.effect_noise((64, 64), 90.0).convert("RGB")
    picture.save(tmp_path / "start.png")
    written = io.BytesIO()
    picture.save(written, "PNG")
    text = base64.b64encode(written.getvalue()).decode()
    table = [
        {"prompt": "a", "image": name, "seed": 1} for name in ("start.png", text, f"data:image/png;base64,{text}")
    ]
    lines = make(write(tmp_path / "prompts.jsonl", table), tmp_path / "out", strength=0.9)
    assert [line["error"] for line in lines] == [None] * 3
    made = [Image.open(tmp_path / "out" / line["file"]).tobytes() for line in lines]
    assert made[0] == made[1] == made[2]
    record = images.read_metadata(tmp_path / "out" / "000003.png")
    assert record["task"] == "image to image" and (tmp_path / "out" / record["image"]).is_file()
    assert len(json.dumps(lines[1]["input"])) < 200, "results do not repeat a picture"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "a", "steps": "many"}, "steps: got 'many', expected a whole number"),
        ({"prompt": "a", "steps": 2.5}, "steps: got 2.5, expected a whole number"),
        ({"prompt": "a", "steps": True}, "steps: got True"),
        ({"prompt": 7}, "prompt: got 7, expected a text"),
        ({"steps": 3}, "prompt: missing"),
        ({"prompt": "a", "steps": 0}, "steps"),
        ({"prompt": "a", "count": 0}, "count 0: expected at least 1"),
        ({"prompt": "a", "seed": -1}, "seed"),
        ({"prompt": "a", "scheduler": "fast"}, "scheduler"),
        ({"prompt": "a", "image": "gone.png"}, "gone.png: no such file"),
        ({"prompt": "a", "steps": 3, "num_inference_steps": 4}, "give one"),
        ({"prompt": "a", "guidance_scale": "nan"}, "guidance_scale"),
    ],
)
def test_a_bad_row_is_recorded_and_the_rest_goes_on(
    make: Make, tmp_path: Path, row: Mapping[str, Any], said: str
) -> None:
    table = [{"prompt": "a"}, dict(row), {"prompt": "b"}]
    first, bad, last = make(write(tmp_path / "prompts.jsonl", table), tmp_path / "out")
    assert said in bad["error"] and bad["file"] is None and bad["row"] == 2
    assert first["error"] is None and last["error"] is None
    assert sorted(pictures(tmp_path / "out")) == ["000001.png", "000003.png"]


def test_lines_that_are_no_rows_are_bad_rows(make: Make, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n[1]\n' + "[" * 5000 + "\n")
    assert ["JSON" in (line["error"] or "") for line in make(tmp_path / "a.jsonl", tmp_path / "a")] == [
        False,
        *[True] * 3,
    ]
    (tmp_path / "b.csv").write_text("prompt,steps\na,2\nb,2,3\n")
    assert "more values" in make(tmp_path / "b.csv", tmp_path / "b")[1]["error"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", b"prompt,guidence_scale\na,3\n", "unknown columns guidence_scale"),
        ("a.csv", b",prompt\n0,a\n", "unknown columns '': expected"),
        ("a.csv", b"prompt,steps,prompt\na,3,b\n", "a column is there twice: prompt, steps, prompt"),
        ("a.csv", b'prompt\n"a\n', "not CSV"),
        ("a.csv", b"prompt\n\xff\n", "not UTF-8"),
        ("a.txt", b"\n\n", "holds no prompts"),
        ("a.parquet", b"PAR1", "not a Parquet file"),
        ("a.xlsx", b"", "ends in .txt, .jsonl, .csv, .parquet"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused_whole(
    make: Make, tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=said):
        make(tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_columns_of_ones_own_are_passed_over_by_name(make: Make, tmp_path: Path) -> None:
    table = write(tmp_path / "a.jsonl", [{"prompt": "a", "id": "x1"}])
    assert make(table, tmp_path / "out", ignored=frozenset({"id"}))[0]["input"]["id"] == "x1"


def test_several_pictures_of_a_row_have_seeds_that_count_up(make: Make, tmp_path: Path) -> None:
    table = write(tmp_path / "a.jsonl", [{"prompt": "a", "count": 3}, {"prompt": "b"}])
    lines = make(table, tmp_path / "out", seed=10)
    assert [(line["file"], line["seed"]) for line in lines] == [
        ("000001-1.png", 10),
        ("000001-2.png", 11),
        ("000001-3.png", 12),
        ("000002.png", 13),
    ]


def test_rows_that_are_added_are_made_and_the_others_are_not_made_again(make: Make, tmp_path: Path) -> None:
    table = tmp_path / "prompts.txt"
    table.write_text("a\nb\n")
    make(table, tmp_path / "out")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.png")}
    table.write_text("a\nb\nc\n")
    assert len(make(table, tmp_path / "out")) == 3
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.png")}
    assert before.items() < after.items() and len(after) == 3


def test_a_row_that_failed_is_tried_again(make: Make, tmp_path: Path) -> None:
    table = write(tmp_path / "a.jsonl", [{"prompt": "a", "image": "later.png"}])
    assert make(table, tmp_path / "out")[0]["error"]
    Image.new("RGB", (64, 64), "red").save(tmp_path / "later.png")
    assert [line["error"] for line in make(table, tmp_path / "out")] == [None]


@pytest.mark.parametrize("change", ["options", "prompt", "models", "a picture of somebody else"])
def test_pictures_of_something_else_are_not_taken_for_this_batch(
    make: Make, toy_folder: Path, tmp_path: Path, change: str
) -> None:
    table, place = tmp_path / "prompts.txt", tmp_path / "out"
    table.write_text("a\n")
    if change == "a picture of somebody else":
        place.mkdir()
        Image.new("RGB", (8, 8)).save(place / "000001.png")
    else:
        make(table, place)
    if change == "prompt":
        table.write_text("b\n")
    if change == "models":
        line = results(place)[0]
        images.write_png(Image.new("RGB", (8, 8)), place / "000001.png", {"batch_key": line["key"][::-1]})
        (place / "results.jsonl").write_text("")
    before = pictures(place)
    steps = 3 if change == "options" else 2
    with pytest.raises(InputError, match=r"000001.png is there already.*--redo"):
        make(table, place, steps=steps)
    assert pictures(place) == before
    assert make(table, place, redo=True, steps=steps)[0]["error"] is None
    assert pictures(place) != before


def test_other_models_and_ways_to_load_them_are_another_batch(toy_folder: Path, tmp_path: Path) -> None:
    def told(folder: Path, **loading: Any) -> str:
        return identity(Setup(str(folder), {"backend": "torch", **loading}, str(tmp_path), 1))

    assert told(toy_folder) == told(toy_folder, compute_units="cpu-only")
    assert told(toy_folder) != told(toy_folder, dtype="float16")
    assert told(toy_folder) != told(toy_folder, check_safety=False)


@pytest.mark.parametrize("cut", ["the line", "half of the line", "the picture"])
def test_a_kill_between_picture_and_line_repeats_nothing(make: Make, tmp_path: Path, cut: str) -> None:
    table, place = tmp_path / "prompts.txt", tmp_path / "out"
    table.write_text("a\nb\n")
    expected = make(table, place)
    text = (place / "results.jsonl").read_text()
    if cut == "the picture":
        (place / "000002.png").unlink()
    else:
        (place / "results.jsonl").write_text(
            text.splitlines()[0] + "\n" + (text.splitlines()[1][:50] if "half" in cut else "")
        )
    before = {path.name: path.stat().st_mtime_ns for path in place.glob("*.png")}
    assert without_time(make(table, place)) == without_time(expected)
    assert before.items() <= {path.name: path.stat().st_mtime_ns for path in place.glob("*.png")}.items()


def test_a_full_disk_ends_the_batch_and_not_a_row(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "prompts.txt").write_text("a\nb\n")
    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(StorageError, match=r"000001.png: the disk is full"):
        make(tmp_path / "prompts.txt", tmp_path / "out")
    assert results(tmp_path / "out") == [] and pictures(tmp_path / "out") == {}
    monkeypatch.undo()
    assert len(make(tmp_path / "prompts.txt", tmp_path / "out")) == 2


def test_workers_take_units_and_devices_in_turn() -> None:
    def told(workers: int | None, units: str | None, devices: str | None) -> list[Mapping[str, Any]]:
        return [one.loading for one in setups("m", {}, "out", 1, workers, units, devices)]

    assert told(None, None, None) == [{}]
    assert told(3, None, None) == [{}, {}, {}]
    both = [{"compute_units": "cpu-and-ne"}, {"compute_units": "cpu-and-gpu"}]
    assert told(None, "cpu-and-ne,cpu-and-gpu", None) == both
    assert told(3, "cpu-and-ne, cpu-and-gpu", None) == [*both, both[0]]
    assert told(None, None, "cuda:0,cuda:1") == [{"device": "cuda:0"}, {"device": "cuda:1"}]
    for workers, units, devices in ((0, None, None), (1, "cpu-and-npu", None), (1, "all", "cpu")):
        with pytest.raises(InputError):
            told(workers, units, devices)


def test_a_second_batch_on_the_same_folder_is_refused(make: Make, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a\n")
    with Folder(tmp_path / "out").hold(), pytest.raises(StorageError, match="is being written by process"):
        make(tmp_path / "prompts.txt", tmp_path / "out")


def test_object_storage_is_written_and_gone_on_with(toy_folder: Path, make: Make, tmp_path: Path) -> None:
    """The calls are those of a bucket; here they go to a folder."""
    from pyarrow import fs

    (tmp_path / "prompts.txt").write_text("a\nb\n")
    expected = make(tmp_path / "prompts.txt", tmp_path / "out")
    bucket = tmp_path / "bucket"
    bucket.mkdir()
    of = setups(str(toy_folder), {"backend": "torch"}, "unused", 1, None, None, None)

    def storage() -> Storage:
        return Storage("s3://bucket/out", fs.SubTreeFileSystem(str(bucket), fs.LocalFileSystem()), "out")

    class Uploading(Here):
        def run(self, tasks: Any) -> Iterator[Answer]:
            worker = Worker(self.setups[0])
            worker.place = storage()
            yield from map(worker.make, tasks)

    def run_it() -> list[Answer]:
        place = storage()
        with place.hold():
            batch = Batch(prepare(tmp_path / "prompts.txt", place, {"steps": 2}, 1, of), place, Uploading(of))
            return list(batch.run())

    assert len(run_it()) == 2
    (bucket / "out" / "results.jsonl").unlink()
    assert run_it() == [], "the pictures say that they are done"
    assert without_time(results(bucket / "out")) == without_time(expected)
    for name, data in pictures(tmp_path / "out").items():
        assert Image.open(io.BytesIO(data)).tobytes() == Image.open(bucket / "out" / name).tobytes()


def test_rows_are_read_by_their_names() -> None:
    assert {
        "prompt",
        "negative_prompt",
        "image",
        "mask_image",
        "num_inference_steps",
        "count",
    } <= rows.COLUMNS.keys()
    with pytest.raises(DiffusionError):
        rows.read(Path("nowhere.csv"))


def test_a_key_is_the_same_in_later_versions() -> None:
    """An option that is new to a version, as it is by default, changes no key: begun batches go on."""
    row = rows.Row(1, {}, {"prompt": "a cat", "seed": 1, "steps": 20})
    (task,), _ = tasks_of([row], {}, 1, "models")
    assert task.key == "31f99f22ae82698c4e8645c755a9de5a"
    (other,), _ = tasks_of([rows.Row(1, {}, {**row.options, "eta": 0.5})], {}, 1, "models")
    assert other.key != task.key
