"""`coreml-sd evaluate`: sweeps, what stands in its way; the judge of shapes agrees with CLIP."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffusion_convert.cli import main as command
from diffusion_runtime.batch.worker import Worker
from diffusion_runtime.errors import InputError
from diffusion_runtime.evaluate import report, sources, sweep
from draw_shapes import write_reference
from judge_shapes import count_right

CLIP = Path(__file__).resolve().parents[1] / "checkpoints" / "shapes-clip"
Evaluate = Callable[..., Any]


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    """Twelve captions, and two pictures of each."""
    folder = tmp_path / "drawn"
    write_reference(folder, every=18, pictures=2, seed=0)
    return folder


@pytest.fixture
def evaluate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Evaluate:
    """``evaluate(*words)`` runs the command here, its workers too, and gives exit code, output and notes. It draws
    into ``tmp_path``/out with the small CLIP unless the words say otherwise."""

    class Here:
        def __init__(self, setups: Any) -> None:
            self.setups = setups

        def run(self, tasks: Any) -> Any:
            worker = Worker(self.setups[0])
            yield from map(worker.make, tasks)

    monkeypatch.setattr("diffusion_runtime.evaluate.sweep.LocalWorkers", Here)

    def run(*words: object, **given: object) -> Any:
        defaults = {"prompts": tmp_path / "drawn/captions.txt", "output": tmp_path / "out", "clip": CLIP}
        options = {**defaults, "features": "clip", "backend": "torch", "threads": 1, **given}
        told = [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if value is not None]
        monkeypatch.setattr(sys, "argv", ["coreml-sd", "evaluate", *map(str, words), *told])
        with pytest.raises(SystemExit) as ended:
            command.main()
        shown = capsys.readouterr()
        return ended.value.code, shown.out, shown.err

    return run


def table(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((folder / report.JSON).read_text())["rows"]
    return rows


def named(toy_folder: Path, *names: str) -> list[str]:
    return [f"{name}={toy_folder}" for name in names]


def test_a_sweep_of_two_models(evaluate: Evaluate, toy_folder: Path, drawn: Path, tmp_path: Path) -> None:
    code, shown, notes = evaluate(
        *named(toy_folder, "one", "two"), guidance="7.5,2", steps=2, reference_images=drawn / "pictures"
    )
    assert code == 0, notes
    rows = table(tmp_path / "out")
    assert [(row["models"], row["guidance_scale"], row["pictures"], row["flagged"]) for row in rows] == [
        (name, scale, 12, 0) for name in ("one", "two") for scale in (2.0, 7.5)
    ]
    assert rows[0] | {"models": "two", "identical": 12} == rows[2], "equal models, prompts and seeds"
    assert rows[0]["identical"] is None and rows[2]["psnr_db"] is None
    for row in rows:
        assert row["frechet_distance"] > row["frechet_floor"] > 0
        assert row["kid_low"] < row["kid"] < row["kid_high"] and row["kid"] > row["kid_floor"]
    with (tmp_path / "out" / report.CSV).open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [float(row["clip_score"]) for row in read] == [row["clip_score"] for row in rows]
    with Image.open(tmp_path / "out" / report.PLOT) as plot:
        assert plot.format == "PNG" and plot.size == (700, 450)
    assert "12 pictures in a set, 64 features" in notes and "KID" in notes
    assert "one" in shown and f"{report.CSV}, {report.JSON}, {report.PLOT}" in shown
    record = json.loads((tmp_path / "out" / report.JSON).read_text())
    assert (record["steps"], record["scheduler"], record["reference"]) == (2, "pndm", str(drawn / "pictures"))


def test_a_size_is_asked_for_where_models_make_several(evaluate: Evaluate, toy_folder: Path, drawn: Path) -> None:
    given = {"guidance": "2", "steps": 1, "reference_images": drawn / "pictures"}
    assert "row 1: 96x64 pixels: these models make 64x64" in evaluate(toy_folder, width=96, **given)[2]


def test_the_first_models_are_the_reference_where_no_pictures_are_given(
    evaluate: Evaluate, toy_folder: Path, tmp_path: Path
) -> None:
    write_reference(tmp_path / "drawn", every=10, pictures=0, seed=0)
    code, _, said = evaluate(*named(toy_folder, "one", "two"), guidance="2", steps=2)
    assert code == 0
    first, second = table(tmp_path / "out")
    assert "1 of 2 Fréchet distances are not above the floor" in said
    assert first["frechet_distance"] is None and first["clip_score"] == second["clip_score"]
    assert abs(second["frechet_distance"]) < 1e-4, "their pictures are the same"
    assert second["frechet_floor"] > 1e-3
    code, _, said = evaluate(*named(toy_folder, "one"), guidance="2", steps=2)
    assert (code, "a second MODELS" in said) == (2, True)


def test_pictures_are_those_of_batch_and_are_made_once(
    evaluate: Evaluate, toy_folder: Path, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupted sweep goes on where it stopped; the models of other pictures are noticed."""
    words = (f"toy={toy_folder}",)
    options = {"guidance": "2,3", "steps": 2, "reference_images": drawn / "pictures"}
    make, made = Worker.make, list[int]()

    def interrupted(worker: Worker, task: Any, *others: Any) -> Any:
        if len(made) == 15:
            raise KeyboardInterrupt
        made.append(task.number)
        return make(worker, task, *others)

    monkeypatch.setattr(Worker, "make", interrupted)
    code, _, said = evaluate(*words, **options)
    assert code == 130 and "interrupted: 15 pictures were made now" in said
    assert not (tmp_path / "out" / report.CSV).exists()
    made[:] = [0] * 20  # it goes on without being stopped at 15
    assert evaluate(*words, **options)[0] == 0
    assert len(made) == 20 + 24 - 15
    plain = tmp_path / "plain"
    told = ["--backend=torch", "--threads=1", "--steps=2", "--guidance-scale=3", "--scheduler=pndm"]
    batch = ["coreml-sd", "batch", str(toy_folder), str(drawn / "captions.txt"), "-o", str(plain), *told]
    monkeypatch.setattr(sys, "argv", batch)
    with pytest.raises(SystemExit):
        command.main()
    assert len(list(plain.glob("*.png"))) == 12
    for path in plain.glob("*.png"):
        assert path.read_bytes() == (tmp_path / "out/toy/guidance-3" / path.name).read_bytes()
    before, count = table(tmp_path / "out"), len(made)
    assert evaluate(*words, **options)[0] == 0 and len(made) == count and table(tmp_path / "out") == before
    code, _, said = evaluate(*words, **{**options, "seed": 5})
    assert code == 2 and "--redo" in said and table(tmp_path / "out") == before


def test_killed_it_goes_on_with_its_own_worker(
    evaluate: Evaluate, toy_folder: Path, drawn: Path, forked_python: Path, tmp_path: Path
) -> None:
    """The command as a process, with a worker's: SIGKILL in the middle changes nothing in the end."""
    given = {"guidance": "2", "steps": 2, "reference_images": drawn / "pictures"}
    assert evaluate(f"toy={toy_folder}", **given)[0] == 0
    words = ["--prompts", drawn / "captions.txt", "--reference-images", drawn / "pictures", "--guidance=2"]
    words += ["--steps=2", "--clip", CLIP, "--features=clip", "--backend=torch", "--threads=1"]
    program = [str(forked_python), "-c", "from diffusion_convert.cli.main import main; main()", "evaluate"]
    arguments = [*program, f"toy={toy_folder}", *map(str, words), "-o", str(tmp_path / "killed")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        while process.poll() is None and len(list(tmp_path.glob("killed/toy/*/*.png"))) < 5:
            time.sleep(0.02)
        process.kill()
        said = process.communicate()[0]
    assert process.returncode == -signal.SIGKILL, said
    assert not (tmp_path / "killed" / report.CSV).exists()
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    undisturbed, killed = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.png") if path.name != report.PLOT}
        for folder in (tmp_path / "out", tmp_path / "killed")
    )
    assert len(killed) == 12 and killed == undisturbed
    assert table(tmp_path / "killed") == table(tmp_path / "out")


def test_with_too_few_pictures_the_command_says_so(
    evaluate: Evaluate, toy_folder: Path, drawn: Path, tmp_path: Path
) -> None:
    (tmp_path / "p.txt").write_text("a red circle\na blue square\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / report.PLOT).write_bytes(b"of another run")
    given = {"prompts": tmp_path / "p.txt", "guidance": "2", "steps": 1, "reference_images": drawn / "pictures"}
    code, shown, notes = evaluate(toy_folder, **given)
    assert code == 0 and "2 pictures in a set: too few for a distance, which needs at least 10" in notes
    (row,) = table(tmp_path / "out")
    assert row["frechet_distance"] is None and row["kid"] is None and row["clip_score"] >= 0
    assert report.PLOT not in shown and not (tmp_path / "out" / report.PLOT).exists()


def _damaged(folder: Path) -> str:
    path = folder / "pictures" / "000-0.png"
    path.write_bytes(path.read_bytes()[:80])
    return "000-0.png"


def _no_pictures(folder: Path) -> str:
    shutil.rmtree(folder / "pictures")
    (folder / "pictures").mkdir()
    (folder / "pictures" / "readme.md").write_text("none")
    return "holds no pictures"


@pytest.mark.parametrize("spoil", [_damaged, _no_pictures])
def test_reference_pictures_are_read_before_any_is_made(
    evaluate: Evaluate, toy_folder: Path, drawn: Path, tmp_path: Path, spoil: Callable[[Path], str]
) -> None:
    said = spoil(drawn)
    code, _, error = evaluate(toy_folder, reference_images=drawn / "pictures")
    assert code == 2 and said in error and error.count("\n") == 1
    assert not list(tmp_path.glob("out/**/*.png"))


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("text\na cat\n", "unknown columns text"),
        ("seed\n1\n", 'has no column "prompt"'),
        ("prompt,guidance_scale\na,3\n", "row 1: guidance_scale: the sweep sets it"),
        ("prompt,steps\na,3\nb,many\n", "row 2: steps: got 'many'"),
        ("prompt\n", "holds no prompts"),
    ],
)
def test_a_table_that_cannot_be_used(
    evaluate: Evaluate, toy_folder: Path, drawn: Path, tmp_path: Path, written: str, said: str
) -> None:
    (tmp_path / "p.csv").write_text(written)
    code, _, error = evaluate(toy_folder, prompts=tmp_path / "p.csv", reference_images=drawn / "pictures")
    assert code == 2 and said in error and error.count("\n") == 1


@pytest.mark.parametrize("given", ["", "1,two", "1,,2", "nan", "-1", "1,1.0", "inf"])
def test_a_wrong_list_of_guidance_scales(evaluate: Evaluate, toy_folder: Path, drawn: Path, given: str) -> None:
    code, _, error = evaluate(toy_folder, guidance=given, reference_images=drawn / "pictures")
    assert code == 2 and f"--guidance {given}" in error and error.count("\n") == 1


def test_names_of_models(tmp_path: Path) -> None:
    assert sweep.name_models(["a/x", "y=a/x"]) == {"x": Path("a/x"), "y": Path("a/x")}
    for wrong in (["a/x", "b/x"], ["/"], ["a/b=x"], ["..=x"]):
        with pytest.raises(InputError, match="give NAME="):
            sweep.name_models(wrong)


def test_no_pickle_is_read(evaluate: Evaluate, toy_folder: Path, drawn: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(CLIP, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    for option in ("clip", "features"):
        code, _, error = evaluate(toy_folder, reference_images=drawn / "pictures", **{option: folder})
        assert code == 2 and "only pytorch_model.bin, a pickle" in error and error.count("\n") == 1
    assert not any(wanted.endswith((".bin", ".pt", ".pth", "*")) for wanted in sources._WANTED)


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _lacking(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _other_kind(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "vit"}))


def _no_tokenizer(folder: Path) -> None:
    for path in (*folder.glob("*vocab*"), *folder.glob("merges*"), *folder.glob("tokenizer*")):
        path.unlink()


def _small_vocabulary(folder: Path) -> None:
    vocabulary = json.loads((folder / "vocab.json").read_text())
    for index in range(50):
        vocabulary[f"added{index}"] = len(vocabulary)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_cut, "cannot be loaded"),
        (_lacking, "lacks 1 weights, as visual_projection.weight"),
        (_other_kind, "a model of type 'vit'"),
        (_no_tokenizer, "holds no tokenizer"),
        (_small_vocabulary, "more tokens than"),
        (lambda folder: (folder / "config.json").unlink(), "config.json: missing"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
    ],
)
def test_a_clip_that_cannot_be_used(
    evaluate: Evaluate,
    toy_folder: Path,
    drawn: Path,
    tmp_path: Path,
    spoil: Callable[[Path], object],
    said: str,
) -> None:
    shutil.copytree(CLIP, tmp_path / "clip")
    spoil(tmp_path / "clip")
    code, _, error = evaluate(toy_folder, reference_images=drawn / "pictures", clip=tmp_path / "clip")
    assert code == 2 and said in error and error.count("\n") == 1, error


def test_sources_that_are_nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"--clip \./nowhere: no such folder"):
        sources.folder_of("./nowhere", "--clip")
    with pytest.raises(Exception, match="no such folder, and the Hub cannot be reached"):
        sources.folder_of("nobody/no-such-model-of-ours", "--clip")


def test_a_full_disk_loses_nothing(
    evaluate: Evaluate, toy_folder: Path, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"guidance": "2", "steps": 1, "reference_images": drawn / "pictures"}
    assert evaluate(toy_folder, **given)[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        code, _, error = evaluate(toy_folder, **given)
    assert code == 2 and "the disk is full" in error and error.count("\n") <= 2
    after = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert after == before


def test_a_missing_extra_is_one_line(evaluate: Evaluate, toy_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "diffusion_runtime.cli.options.find_spec", lambda name: None if name == "torchmetrics" else 1
    )
    code, _, error = evaluate(toy_folder)
    assert code == 2 and error == "error: evaluate needs torchmetrics: run `pip install 'coreml-sd[evaluate]'`\n"


def test_clip_score_agrees_in_order_with_the_judge(evaluate: Evaluate, tmp_path: Path, shapes_folder: Path) -> None:
    """The shapes checkpoint over guidance scales: where more pictures are right, the CLIP score is higher."""
    write_reference(tmp_path / "drawn", every=18, pictures=2, seed=0)
    scales = (0.5, 1.5, 5.0)
    code, _, error = evaluate(
        shapes_folder,
        "--no-safety",
        guidance=",".join(map(str, scales)),
        steps=4,
        reference_images=tmp_path / "drawn" / "pictures",
    )
    assert code == 0, error
    rows = table(tmp_path / "out")
    right = [count_right(tmp_path / "out" / "models" / f"guidance-{scale:g}")[0] for scale in scales]
    assert right == sorted(set(right)), f"the scales should part the shares of right pictures: {right} of 12"
    scores = [row["clip_score"] for row in rows]
    assert scores == sorted(set(scores)), "as many places, in the same order"
    assert rows[-1]["frechet_distance"] < rows[0]["frechet_distance"]
