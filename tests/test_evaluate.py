"""evaluate.py: every metric against a computation by hand, its cache, its tables, and bad input."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import random_weights
import scipy.linalg
import torch
import torch.nn.functional as F
from conftest import CPU, PROMPTS, random_lora, run_script, use_bf16
from PIL import Image
from random_weights import vit_feature
from safetensors.torch import save_file
from transformers import AutoImageProcessor, ViTModel

import evaluate
import rewards
from common import TOY, generator, load_model, make_trainable
from judges.detector import load_detector
from rewards import load_reward
from run_folder import generate, to_pil
from toy.oracle import correct
from toy.scenes import render, sample_scene


def measure(*words):
    assert run_script(evaluate, *words, "--out", "results.json") == 0
    return json.loads(Path("results.json").read_text())


def read_rows(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def write_rows(folder, rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def pixels_of(path):
    return pixels_of_pil(Image.open(path))


def pixels_of_pil(image):
    pixels = np.asarray(image, np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1)


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return random_weights.write_vit(tmp_path_factory.mktemp("vit"))


@pytest.fixture
def scenes(tmp_path):
    """Folders a and b with 3, 1 and 4 scenes per prompt, a few under a wrong caption."""
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        rows = []
        for i, num_images in enumerate((3, 1, 4)):
            for k in range(num_images):
                image, _ = render(sample_scene(rng, PROMPTS[(i + (k == 2)) % 3]))
                file_name = f"{i}-{k}.png"
                to_pil(torch.tensor(image).permute(2, 0, 1)).save(tmp_path / name / file_name)
                rows.append(dict(file_name=file_name, text=PROMPTS[i], prompt_id=i, seed=k))
        write_rows(tmp_path / name, rows)
    return tmp_path


def by_prompt(folder, value_of):
    """{prompt id: mean of value_of(image, prompt)}."""
    rows = read_rows(folder)
    values = [value_of(pixels_of(folder / row["file_name"]), row["text"]) for row in rows]
    return evaluate.prompt_means(torch.tensor(values), [str(row["prompt_id"]) for row in rows])


def test_prompt_means_and_diversity_equal_loops():
    means = evaluate.prompt_means(torch.tensor([1.0, 2.0, 4.0]), ["p", "q", "p"])
    assert means == {"p": 2.5, "q": 2.0}
    # Where the oracle abstains, an image is not correct.
    values = torch.tensor([1.0, float("nan"), 0.0, 1.0])
    summary = evaluate.summarize("toy_correct", values, [*"pprr"])
    assert summary["per_prompt"] == {"p": 0.5, "r": 0.5} and summary["abstained"] == 0.25
    rng = np.random.default_rng(0)
    features, ids = rng.normal(size=(9, 5)), [*"xyxzyxwwx"]
    expected = {}
    for prompt_id in "xyw":  # z has one image, and so no pair
        group = [f / np.linalg.norm(f) for f, other in zip(features, ids) if other == prompt_id]
        pairs = [1 - group[i] @ group[j] for i in range(len(group)) for j in range(i)]
        expected[prompt_id] = np.mean(pairs)
    assert evaluate.dino_diversity(torch.tensor(features), ids) == pytest.approx(expected)


@pytest.mark.parametrize("n, m, d", [(60, 50, 12), (10, 9, 16)])
def test_frechet_equals_scipys_square_root(n, m, d):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)), rng.normal(0.3, 1, (m, d))
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)
    rel = 1e-4 if n < d else 1e-9
    assert evaluate.frechet(torch.tensor(a), torch.tensor(b)) == pytest.approx(expected, rel=rel)
    assert evaluate.frechet(torch.tensor(a), torch.tensor(a)) == pytest.approx(0, abs=1e-5)


def test_covariance_distances_equal_numpys():
    rng = np.random.default_rng(0)
    # Four images span three of six directions: there the eigenvalues count as 1e-8.
    a, b = rng.normal(size=(40, 6)) * [1, 2, 3, 1, 1, 1], rng.normal(size=(4, 6))
    spectra = []
    for x in (a, b):
        covariance = np.cov((x / np.linalg.norm(x, axis=1, keepdims=True)).T)
        spectra.append(np.sort(np.linalg.eigvals(covariance).real))
    distances = evaluate.covariance_distances(torch.tensor(a), torch.tensor(b))
    logs = np.log(np.maximum(spectra, 1e-8))
    expected = (np.linalg.norm(spectra[0] - spectra[1]), np.abs(logs[0] - logs[1]).mean())
    assert distances == pytest.approx(expected)


def test_cov_dist_reaches_the_values_of_imagerefls_table():
    """Its Table 3 goes from .0052 to .0202. A mean over 384 dimensions is at most 2 / 384."""
    num_directions = 384
    narrow = torch.eye(num_directions)[:4].repeat(100, 1)
    wide = torch.eye(num_directions).repeat(2, 1)
    collapsed, _ = evaluate.covariance_distances(narrow, wide)
    assert collapsed > 0.4
    generated = torch.cat([wide, wide, narrow[:16]])
    slightly, _ = evaluate.covariance_distances(generated, wide)
    assert 0.005 < slightly < 0.02


PROCESSORS = {
    "as facebook/dino-vits16": dict(
        feature_extractor_type="ViTFeatureExtractor", size=48, resample=2, do_resize=True
    ),
    "squash, bicubic": dict(
        image_processor_type="ViTImageProcessor", size=dict(height=48, width=48), resample=3
    ),
    "crop": dict(
        image_processor_type="BitImageProcessor",
        size=dict(shortest_edge=56),
        crop_size=dict(height=48, width=48),
        resample=3,
    ),
}


@pytest.mark.parametrize("settings", PROCESSORS.values(), ids=PROCESSORS)
@torch.no_grad()
def test_dino_takes_the_settings_of_its_processor(settings, tmp_path):
    folder = random_weights.write_vit(tmp_path)
    content = dict(settings, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.25, 0.3])
    (folder / "preprocessor_config.json").write_text(json.dumps(content))
    coarse = torch.rand(1, 3, 5, 7, generator=generator(0, "pixels"))
    image = to_pil(F.interpolate(coarse, (50, 133), mode="bicubic")[0].clamp(0, 1))
    # PIL does here what these settings say.
    if "crop_size" in settings:
        image_there = image.resize((56 * 133 // 50, 56), Image.Resampling.BICUBIC)
        left = (image_there.width - 48) // 2
        image_there = image_there.crop((left, 4, left + 48, 52))
    else:
        image_there = image.resize((48, 48), Image.Resampling(settings["resample"]))
    expected = vit_feature(folder, pixels_of_pil(image_there))
    dino = evaluate.Dino(folder, CPU)
    feature = dino(pixels_of_pil(image)[None])[0]
    assert 1 - feature @ expected < 1e-5
    # The library's processor, given the image itself.
    official = AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt").pixel_values
    network = ViTModel.from_pretrained(folder, add_pooling_layer=False)
    token = network(official).last_hidden_state[0, 0]
    torch.testing.assert_close(feature, F.normalize(token, dim=0), rtol=0, atol=1e-6)
    # Another processor would show.
    wrong = vit_feature(folder, pixels_of_pil(image.crop((41, 0, 91, 50)).resize((48, 48))))
    assert 1 - feature @ wrong > 1e-3


def test_intervals():
    rng = np.random.default_rng(1)
    samples = rng.normal(1, 2, (200, 40)).tolist()
    intervals = [evaluate.interval(values, resamples=400) for values in samples]
    # 95 % by name, and a little less with 40 prompts.
    assert 0.88 <= np.mean([low <= 1 <= high for _, low, high in intervals]) <= 0.99
    torch.manual_seed(1)
    assert evaluate.interval(samples[0], resamples=400) == intervals[0]
    assert evaluate.summarize_prompts({"0": 3.0})["low"] is None


def test_pairs_have_the_same_prompts_and_seeds():
    rows = [dict(prompt_id=p, text=p, seed=s) for p in "ab" for s in (0, 1)]
    evaluate.check_pairs(rows, rows[::-1])
    for changed in ([*rows[:3], dict(rows[3], seed=2)], [*rows[:2], dict(rows[2], text="x")]):
        with pytest.raises(ValueError, match="1 of 2 and 2 prompts have the same text and seeds"):
            evaluate.check_pairs(rows, changed)
    with pytest.raises(ValueError, match="no seeds"):
        evaluate.check_pairs(rows, [dict(rows[0], seed=None)])


def test_metrics_equal_a_computation_by_hand(scenes, vit):
    a, b = scenes / "a", scenes / "b"
    clip, _ = load_reward("toy_clip", CPU)
    judge, _ = load_reward(f"toy_pref:{TOY}/pref_b", CPU)
    detector = load_detector(TOY / "detector", CPU)
    by_hand = dict(
        toy_correct=lambda image, text: correct(image, text) is True,
        toy_clip=lambda image, text: clip(image[None], [text]).item(),
        toy_pref_b=lambda image, text: judge(image[None], [text]).item(),
        artifact_mean=lambda image, text: detector(image[None]).mean().item(),
        artifact_max=lambda image, text: detector(image[None]).max().item(),
    )
    metrics = ",".join([*by_hand, "dino_div,drift"])
    result = measure(a, b, "--metrics", metrics, "--dino", vit, "--plot", "plot.png")
    assert Image.open("plot.png").size == (5 * 440, 374)
    own = result["folders"][str(a)]
    for metric, value_of in by_hand.items():
        expected = by_prompt(a, value_of)
        assert own[metric]["per_prompt"] == pytest.approx(expected, abs=1e-4)
        mean = np.mean([*expected.values()])
        assert own[metric]["mean"] == pytest.approx(mean, abs=1e-4)
        difference = result["differences"][str(b)][metric]["mean"]
        mean_of_b = result["folders"][str(b)][metric]["mean"]
        assert difference == pytest.approx(mean_of_b - mean, abs=1e-4)
    assert 0 < own["toy_correct"]["mean"] < 1
    features = [vit_feature(vit, pixels_of(a / f"0-{k}.png")) for k in range(3)]
    cosines = [features[i] @ features[j] for i, j in ((0, 1), (0, 2), (1, 2))]
    diversity = own["dino_div"]["per_prompt"]
    assert diversity["0"] == pytest.approx(1 - np.mean(cosines), abs=1e-5)
    assert list(diversity) == ["0", "2"] and own["dino_div"]["left_out"] == 1
    x, y = pixels_of(a / "1-0.png"), pixels_of(b / "1-0.png")
    drift = result["drift"][str(b)]
    psnr = 10 * np.log10(1 / (x - y).square().mean().item())
    assert drift["psnr"]["per_prompt"]["1"] == pytest.approx(psnr, abs=1e-4)
    distance = 1 - vit_feature(vit, x) @ vit_feature(vit, y)
    assert drift["dino"]["per_prompt"]["1"] == pytest.approx(distance.item(), abs=1e-5)


def test_identical_folders_differ_by_nothing(scenes):
    a, c = str(scenes / "a"), str(scenes / "c")
    shutil.copytree(a, c)
    result = measure(a, c, "--reference", c, "--metrics", "toy_pref,frechet_toy,cov_dist,drift")
    assert [difference["mean"] for difference in result["differences"][c].values()] == [0, 0, 0]
    assert result["folders"][a]["frechet_toy"]["mean"] == pytest.approx(0, abs=1e-6)
    assert result["drift"][c]["psnr"]["mean"] == pytest.approx(100)
    assert result["drift"][c]["dino"]["mean"] == pytest.approx(0, abs=1e-6)


def test_order_and_batch_size_do_not_matter(scenes, vit):
    a, b = str(scenes / "a"), str(scenes / "b")
    words = [a, b, "--metrics", "toy_clip,drift", "--dino", vit]
    before = measure(*words)
    write_rows(scenes / "b", read_rows(scenes / "b")[::-1])
    assert measure(*words) == before
    shutil.rmtree(scenes / "b" / ".evaluate")
    after = measure(*words, "--batch_size", 3)["folders"][b]["toy_clip"]
    assert after["mean"] == pytest.approx(before["folders"][b]["toy_clip"]["mean"], abs=1e-4)
    # Another seed: nothing pairs, and drift is nothing but pairs.
    rows = read_rows(scenes / "b")
    write_rows(scenes / "b", [dict(rows[0], seed=9), *rows[1:]])
    assert "does not pair" in run_script(evaluate, *words)
    result = measure(a, b, "--metrics", "toy_clip")
    assert result["differences"] == {} and list(result["not_paired"]) == [b]


def test_features_are_kept_until_something_changes(scenes, vit, capsys):
    """We falsify the cache, so that one sees whether it was read."""
    a = scenes / "a"
    cache = a / ".evaluate" / "dino.safetensors"

    def diversity():
        result = measure(a, "--metrics", "dino_div", "--dino", vit)
        return result["folders"][str(a)]["dino_div"]["mean"]

    def falsify():
        with evaluate.safe_open(cache, "pt") as file:
            key = file.metadata()["key"]
            features = file.get_tensor("features")
        save_file({"features": torch.ones_like(features)}, cache, {"key": key})

    true = diversity()
    falsify()
    assert true > 0.01 and diversity() == pytest.approx(0, abs=1e-6)
    # An image is written again, then other weights are, and then a text changes.
    for path in (a / "0-0.png", vit / "model.safetensors"):
        path.write_bytes(path.read_bytes())
        assert diversity() == true
        falsify()
    write_rows(a, [dict(row, text=row["text"] + "!") for row in read_rows(a)])
    assert diversity() == true
    cache.write_bytes(b"damaged")
    assert diversity() == true and "not readable" in capsys.readouterr().out


@pytest.mark.parametrize("rank", [4, 0])
def test_over_steps(world, vit, tmp_path, rank):
    run = tmp_path / "run"
    model = load_model(world.sd, CPU)
    params = make_trainable(model, rank)
    for step in (1, 2):
        random_lora(params if rank else params[:1], size=0.1 * step)
        model.save(run / ("lora" if rank else "model") / f"step_{step:06d}")
    sampler = dict(scheduler="ddpm", eta=1.0, num_inference_steps=2, guidance_scale=1.0)
    config = dict(model=world.sd, lora_rank=rank, resolution=16, test_prompts=world.prompts)
    (run / "config.json").write_text(json.dumps({**config, "sampler": sampler}))
    words = ["--over_steps", run, "--num_images", 2, "--dino", vit]
    words += ["--metrics", "dino_div,drift", "--plot", "steps.png"]
    result = measure(*words)
    assert list(result["steps"].values()) == [0, 1, 2] and len(result["drift"]) == 2
    assert len({result["folders"][folder]["dino_div"]["mean"] for folder in result["steps"]}) == 3
    for i, image in enumerate(generate(model, PROMPTS, 0, sampler, 2)):
        saved = pixels_of(run / f"over_steps/step_000002/{i // 2:05d}_{i % 2:02d}.png")
        assert (image - saved).abs().max() < 1.01 / 255
    # Nothing is sampled twice.
    made = {path: path.stat().st_mtime_ns for path in run.rglob("*.png")}
    assert len(made) == 3 * 4 * 2 and Path("steps.png").is_file()
    assert measure(*words) == result
    assert made == {path: path.stat().st_mtime_ns for path in run.rglob("*.png")}


def test_over_steps_needs_a_run_that_can_be_sampled(tmp_path):
    """A detector's run has an empty sampler."""
    (tmp_path / "config.json").write_text(json.dumps(dict(sampler={}, train_steps=4)))
    message = run_script(evaluate, "--over_steps", tmp_path, "--metrics", "toy_pref")
    assert "names no sampler" in message


def test_report(capsys):
    summary = dict(mean=0.5, low=0.25, high=0.75, prompts=2, per_prompt={"0": 0.4, "1": 0.6})
    no_value = dict(mean=None, low=None, high=None, prompts=0, per_prompt={}, left_out=2)
    distance = dict(mean=2.0, low=None, high=None, prompts=2, per_prompt={}, full_rank=False)
    own = dict(toy_correct={**summary, "abstained": 0.125}, dino_div=no_value, cov_dist=distance)
    folders = {"x": [dict(prompt_id="0"), dict(prompt_id="1")]}
    results = dict(folders={"x": own}, differences={}, not_paired={}, drift={})
    evaluate.report(results, folders, dict(dino="toy", detector=None))
    assert capsys.readouterr().out == (
        "folder  images  prompts  toy_correct              dino_div  cov_dist\n"
        "x       2       2        0.5000 [0.2500, 0.7500]  -         2.0000\n"
        "\n"
        "x: dino_div leaves out 2 of 2 prompts with only one image\n"
        "x: the oracle abstained on 12.5% of the images (counted as wrong)\n"
        "x: too few images for cov_dist: we need more images than the features have "
        "dimensions\n"
        "dino: toy\n"
    )


def test_inception_is_pytorch_fids(tmp_path, monkeypatch):
    inception = pytest.importorskip("pytorch_fid.inception")
    state = {}
    with monkeypatch.context() as patch:
        patch.setattr(inception, "load_state_dict_from_url", lambda url, progress: None)
        keep = lambda network, _: state.update(network.state_dict())
        patch.setattr(torch.nn.Module, "load_state_dict", keep)
        theirs = inception.InceptionV3().eval()
    file = tmp_path / "weights.pth"
    torch.save(state, file)
    with pytest.raises(ValueError, match="its sha256 differs"):
        evaluate.Inception(file, CPU)
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setattr(evaluate, "INCEPTION_SHA256", sha256)
    images = torch.rand(2, 3, 40, 40, generator=generator(0, "images"))
    with torch.no_grad():
        features = evaluate.Inception(file, CPU)(images)
        assert torch.equal(features, theirs(images)[0][:, :, 0, 0]) and features.std() > 0


def test_bad_folders_and_flags(tmp_path):
    def message_of(*words):
        return run_script(evaluate, tmp_path, "--metrics", *words)

    Image.new("RGB", (64, 64)).save(tmp_path / "x.png")
    row = dict(file_name="x.png", text="a red star")
    for rows, message in (
        ([], "it lists no images"),
        (["{"], "line 1: "),
        ([dict(row, file_name="../x.png")], "outside the folder"),
        ([dict(row, file_name="gone.png")], "gone.png is missing"),
        ([row, row], "a file is listed twice"),
        ([dict(row, prompt_id=1), dict(prompt_id=1, text="x", file_name="./x.png")], "two texts"),
    ):
        write_rows(tmp_path, rows)
        assert message in message_of("toy_clip")
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row), encoding="utf-16")
    assert "metadata.jsonl: not UTF-8 text" in message_of("toy_clip")
    write_rows(tmp_path, [dict(row, text="a photo of a cat")])
    for words, message in (
        ("toy_clip --batch_size 0", "--batch_size 0: it must be 1 or more"),
        ("toy_correct", "not a caption of the toy world"),
        (f"cov_dist --reference {tmp_path}", "one image has no covariance"),
        ("toy_perf", "no such metric"),
        ("fid", "needs --reference"),
        ("drift", "needs two folders"),
        ("toy_clip --plot p.png", "--plot needs"),
        (f"dino_div --dino {tmp_path}", "dino: cannot load its weights"),
        ("dino_div --dino toy/absent", "dino: toy/absent is no file or folder here, nor a hub"),
    ):
        assert message in message_of(*words.split())
    # PIL would turn a 16-bit gray image white.
    Image.new("I;16", (64, 64), 30000).save(tmp_path / "gray.png")
    (tmp_path / "damaged.png").write_bytes(b"damaged")
    for name, reason in (("gray", "more than 8 bits"), ("damaged", "cannot identify")):
        with pytest.raises(OSError, match=f"{name}.png: not a readable image .{reason}"):
            evaluate.open_image(tmp_path / f"{name}.png")
    # Transparency is dropped, and nothing is composited.
    Image.new("RGBA", (2, 2), (10, 20, 30, 0)).save(tmp_path / "clear.png")
    assert evaluate.open_image(tmp_path / "clear.png").getpixel((0, 0)) == (10, 20, 30)


def test_judges_measure_in_fp32_where_training_takes_bf16(monkeypatch):
    """As on CUDA, where a judge in bf16 would be off by more than many a difference."""
    use_bf16(monkeypatch)
    for name in ("toy_pref", "toy_pref_b", "toy_clip"):
        source = TOY / name.removeprefix("toy_")
        assert evaluate.build_network(name, str(source), CPU).clip.dtype == torch.float32
    reward, _ = rewards.load_reward("toy_pref", CPU)
    assert reward.clip.dtype == torch.bfloat16
