"""D-Fusion on the toy world: its pairs, the gradients that they give, and training on them."""
import itertools
import json
import re

import torch

import dfusion_dpo
from common import decode, encode_once, generate, generator, initial_latents, load_model, load_reward, make_scheduler, save_grid, trainable
from evaluate import Dino
from toy import oracle

from .tools import IMAGES, PROMPTS, ROOT, SEEDS, Judges, cell, json_lines, mean, shrink, subplots, together, train

FUSED = {"layers 3-6, steps 18-1 (the paper's)": ("3-6", "18-1"), "layer 3": ("3", "18-1"), "layers 2-4": ("2-4", "18-1"), "layers 3-5": ("3-5", "18-1"),
         "all layers": ("0-6", "18-1"), "steps 20-1": ("3-6", "20-1"), "steps 18-10": ("3-6", "18-10"), "steps 9-1": ("3-6", "9-1")}


def pairs_measured(out):
    """D-Fusion's pairs on the base model: is a target the base's scene with the reference's item? Do the masks find the items? And Figure 9."""
    if (out / "pairs.md").exists():
        return (out / "pairs.md").read_text().split("\n")
    torch.set_num_threads(1)
    device = torch.device("cpu")
    model, reward, dino = load_model("toy", device), load_reward("toy_clip", device)[0], Dino(ROOT / "toy" / "dino", device)
    args = dfusion_dpo.parse_args(["--guidance_scale", "5", "--num_inference_steps", "20", "--out", str(out / "unused")])
    scheduler, blocks, scale = make_scheduler(model, "ddim", args.num_inference_steps), dfusion_dpo.attention_blocks(model), args.guidance_scale
    capturing, lines, pictures, N = dfusion_dpo.modules_of(model, [blocks[args.mask_layer]], "attn2"), [], {}, 16
    steps_of = lambda text: range(args.num_inference_steps - max(dfusion_dpo.span("", text)), args.num_inference_steps - min(dfusion_dpo.span("", text)) + 1)
    right = lambda images, prompt: [float(oracle.correct(image, prompt) is True) for image in images]
    for template in ("attributes", "relations"):
        rows = dfusion_dpo.read_items(args.prompts, template)[0][::5]                      # 8 of its 40 training prompts
        plain, fused, found = [], {name: [] for name in FUSED}, []
        for p, row in enumerate(rows):
            prompt, generators = row["prompt"], lambda which: [generator(0, "pairs", p, int(k)) for k in which]
            spans = [dfusion_dpo.token_span(model.pipe.tokenizer, prompt, item, args.item_token) for item in row["items"]]
            with dfusion_dpo.installed(model, dfusion_dpo.CrossAttentionMaps(N), capturing) as maps_of:
                x, maps = dfusion_dpo.sample_trajectories(model, scheduler, prompt, generators(range(N)), scale, maps_of, spans)
            images, r = dfusion_dpo.score(model, reward, x[:, -1], prompt, N)
            reference, base, source = dfusion_dpo.choose(r)
            masks = dfusion_dpo.merge_masks(maps[reference], row["thresholds"], args.mask_merge)
            with torch.no_grad():
                features = dino(images)
            a, b = reference[source], base
            plain.append((r[b].mean(), r[a].mean(), (features[a] * features[b]).sum(-1).mean(), (images[a] - images[b]).abs().mean(),
                          mean(right(images[b], prompt)), mean(right(images[a], prompt))))
            for k, m in zip(reference, masks):                             # the masks against the objects, as the oracle cuts them out
                pixels = oracle.to_array(images[k])
                thing = torch.from_numpy(oracle.segment(pixels, oracle.background_of(pixels)) > 0).float()
                thing = torch.nn.functional.adaptive_avg_pool2d(thing[None], m.shape[-1])[0]
                m = m[steps_of(args.fusion_steps)].float()
                found.append(((m * thing).sum((1, 2)) / thing.sum(), m.mean((1, 2)), thing.mean().expand(len(m))))
            for name, (layers, steps) in FUSED.items():
                names = dfusion_dpo.modules_of(model, [blocks[i] for i in dfusion_dpo.span("", layers)], "attn1")
                with dfusion_dpo.installed(model, dfusion_dpo.SelfAttentionFusion(), names) as fusion:
                    target = dfusion_dpo.fuse(model, scheduler, fusion, prompt, x[reference], x[base], source, masks, generators(base), scale, steps_of(steps))
                made, r_t = dfusion_dpo.score(model, reward, target[:, -1], prompt, N)
                with torch.no_grad():
                    cosine = (dino(made) * features[b]).sum(-1).mean()
                fused[name].append((r_t.mean(), (r_t >= r[b]).float().mean(), cosine, (made - images[b]).abs().mean(), mean(right(made, prompt))))
                if p < 6:
                    pictures.setdefault((template, p), [images[base[0]], images[reference[0]]]).append(made[0])
        columns = lambda parts: torch.tensor(parts, dtype=torch.float64).mean(0).tolist()
        r_b, r_a, cosine, pixels, right_b, right_a = columns(plain)
        lines += [f"\n{template}: {len(rows)} prompts, {N} images each, {len(base)} pairs a prompt\n",
                  "| | toy_clip | adopted | toy_correct | cosine to the base (DINO) | pixel distance to the base |", "|---|---|---|---|---|---|",
                  f"| base | {r_b:.3f} | | {right_b:.2f} | 1 | 0 |", f"| reference | {r_a:.3f} | | {right_a:.2f} | {cosine:.3f} | {pixels:.3f} |"]
        for name in FUSED:
            r_t, adopted, cosine, pixels, correct = columns(fused[name])
            lines.append(f"| target: {name} | {r_t:.3f} | {adopted:.2f} | {correct:.2f} | {cosine:.3f} | {pixels:.3f} |")
        inside, area, objects = (torch.cat(x).mean().item() for x in zip(*found))
        lines.append(f"\nmasks: {area:.1%} of the latent; the objects are {objects:.1%} of the picture, {inside:.1%} of them under the mask")
    save_grid(torch.cat([torch.stack(images) for images in pictures.values()]), out / "pairs.png", columns=2 + len(FUSED))
    shrink(out / "pairs.png")
    (out / "pairs.md").write_text("\n".join(lines))
    return lines


ALGOS, METHODS = ("dpo", "ddpo", "dpok"), {"fused": (), "naive": ("--naive",)}
SNAPSHOTS = (16, 32)                             # updates: after 8 and 16 rounds of 64 images, 8 prompts x 8; two updates each
DFUSION = ("--micro_batch", 32, "--train_steps", SNAPSHOTS[-1], "--save_every", SNAPSHOTS[0])     # the rest: toy's row, from what `gradients` finds


def training(out, jobs):
    """D-Fusion's Figures 6 and 7: do fused pairs teach more than naive ones, on unseen prompts? And section 4.4's ablation."""
    tests, device = dfusion_dpo.read_items(str(ROOT / "prompts" / "dfusion_toy.json"), "both")[1][:PROMPTS], torch.device("cpu")
    kinds = {f"{algo}, {method}": ("--algo", algo, *words) for algo in ALGOS for method, words in METHODS.items()}
    kinds["dpo, fused, inverted trajectories"] = ("--algo", "dpo", "--trajectory", "inversion")
    runs = {(kind, s): out / f"{re.sub(', | ', '_', kind)}_{s}" for s in SEEDS for kind in kinds}
    together(jobs, [lambda k=k, s=s: train(out, runs[k, s].name, "dfusion_dpo", *DFUSION, *kinds[k], "--seed", s) for k, s in runs])

    sampler = json.loads((next(iter(runs.values())) / "config.json").read_text())["sampler"]
    reward, judges = load_reward("toy_clip", device)[0], Judges()

    def measure(lora):
        """Of images on seeds that training never saw; lora None is the base model."""
        done = out / "measured" / (f"{lora.parent.parent.name}_{lora.name}.json" if lora else "base.json")
        if not done.exists():
            model = load_model("toy", device)
            encode_once(model, tests)
            if lora:
                trainable(model, 8, init_lora=str(lora))
            images, each = generate(model, tests, 1, sampler, IMAGES), [p for p in tests for _ in range(IMAGES)]
            with torch.no_grad():
                clip = torch.cat([reward(images[i:i + 32], each[i:i + 32]) for i in range(0, len(each), 32)]).mean().item()
            done.parent.mkdir(exist_ok=True)
            done.write_text(json.dumps(dict(toy_clip=clip) | judges(images, tests, IMAGES)) + "\n")
            save_grid(images.unflatten(0, (-1, IMAGES))[:8].flatten(0, 1), done.with_suffix(".png"), columns=IMAGES)
        return json.loads(done.read_text())

    torch.set_num_threads(1)
    base, change, logs = measure(None), {}, {key: json_lines(run / "log.jsonl") for key, run in runs.items()}
    for (k, s), n in itertools.product(runs, SNAPSHOTS):
        row = measure(runs[k, s] / "lora" / f"step_{n:06d}")
        change[k, s, n] = {m: row[m] - base[m] for m in base}
    lines = ["\nunseen prompts, the change from the base model at the same seeds (" + ", ".join(f"{m} {v:.3f}" for m, v in base.items()) + ")\n",
             "| | images | passes | adopted | " + " | ".join(base) + " |", "|---|" + "---|" * (3 + len(base))]
    for n in SNAPSHOTS:
        for k in kinds:
            rows = [[r for r in logs[k, s] if r["step"] <= n] for s in SEEDS]
            adopted = [r["adoption"] for part in rows for r in part if "adoption" in r]
            lines.append(f"| {k} | {rows[0][-1]['images']:,} | {sum(r['passes'] for r in rows[0]):,} | " + (f"{mean(adopted):.2f}" if adopted else "")
                         + " | " + " | ".join(cell([change[k, s, n][m] for s in SEEDS], 4, "+") for m in base) + " |")
    lines.append("\nfused minus naive, mean (each seed)\n")
    for n in SNAPSHOTS:
        for algo in ALGOS:
            each_seed = {m: [change[f"{algo}, fused", s, n][m] - change[f"{algo}, naive", s, n][m] for s in SEEDS] for m in base}
            lines.append(f"  {algo:<5}{n} updates  " + "  ".join(f"{m} {mean(d):+.3f} ({' '.join(f'{x:+.3f}' for x in d)})" for m, d in each_seed.items()))

    figure, axes = subplots(2, 3, 3.7, 3, sharey="row")
    for column, algo in zip(axes.T, ALGOS):
        for method, colour in zip(METHODS, ("tab:blue", "tab:red")):
            for s in SEEDS:
                rows = logs[f"{algo}, {method}", s]
                at = [sum(r["passes"] for r in rows if r["step"] <= n) / 1000 for n in (0, *SNAPSHOTS)]
                for axis, m in zip(column, ("toy_clip", "toy_correct")):
                    axis.plot(at, [0, *(change[f"{algo}, {method}", s, n][m] for n in SNAPSHOTS)], "o-", color=colour, markersize=3,
                              label=method if s == SEEDS[0] else None)
                    axis.set(title=f"{algo}: {m}, change", xlabel="thousand images through the U-Net")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(out / "training.png", dpi=80)
    return lines


def gradients(out):
    """Why: is the gradient of a round the same as that of another, and as the reward's own? The reward's: backpropagated through all of sampling."""
    torch.set_num_threads(1)
    notes = [""]
    lines = ["\nDPO's gradient at the base model, rounds of 64 images: mean cosine between rounds, and to the gradient of the mean reward (± its standard error)\n",
             "| guidance, steps | t | naive: between rounds | to the reward's | fused: between rounds | to the reward's |", "|---|---|---|---|---|---|"]
    for scale, T, rounds in ((1, 10, 4), (5, 20, 3)):
        done = out / f"gradients_{scale}_{T}.json"
        if not done.exists():
            args = dfusion_dpo.parse_args(["--guidance_scale", str(scale), "--num_inference_steps", str(T), "--out", str(out / "unused")])
            model, reward = load_model("toy", torch.device("cpu")), load_reward("toy_clip", torch.device("cpu"))[0]
            rows = dfusion_dpo.read_items(args.prompts, "attributes")[0][::5]              # 8 prompts, the same in all rounds
            encode_once(model, [row["prompt"] for row in rows])
            params, scheduler, blocks = trainable(model, args.lora_rank), make_scheduler(model, "ddim", T), dfusion_dpo.attention_blocks(model)
            modules = (dfusion_dpo.modules_of(model, [blocks[args.mask_layer]], "attn2"),
                       dfusion_dpo.modules_of(model, [b for b in blocks if not b.startswith("down")], "attn1"))

            def take():
                """The gradient as one vector of length 1."""
                vector = torch.cat([p.grad.flatten() for p in params])
                for p in params:
                    p.grad = None
                return vector / vector.norm()

            halves = []
            for seed in range(2):                                         # 64 images each; only gradients are kept
                for row in rows:
                    generators, texts = [generator(seed, "true", row["prompt"], k) for k in range(8)], [row["prompt"]] * 8
                    x = initial_latents(model, generators)
                    for t in scheduler.timesteps:
                        mu, sigma = dfusion_dpo.ddim_step(scheduler, dfusion_dpo.guided(model, x, t.expand(8), texts, scale), t.expand(8), x)
                        x = mu + sigma * initial_latents(model, generators)
                    (-reward(decode(model, x), texts).mean()).backward()
                halves.append(take())
            truth, found = sum(halves) / sum(halves).norm(), {}
            groups = [range(a, min(a + T // 5, T - 1)) for a in range(0, T - 1, T // 5)]
            for number, naive in itertools.product(range(rounds), (True, False)):
                args.naive = naive
                pairs, _ = dfusion_dpo.sample_round(args, model, scheduler, reward, rows, modules, range(2, T), {}, number)
                for steps in groups:
                    couples = torch.tensor([(p, i) for p in range(len(pairs.prompts)) for i in steps])
                    for part in couples.split(16):
                        (dfusion_dpo.pair_loss(args, model, scheduler, pairs, *part.T)[0] * len(part) / len(couples)).backward()
                    found.setdefault((steps, naive), []).append(take())
            table = []
            for steps, naive in itertools.product(groups, (True, False)):
                v = torch.stack(found[steps, naive])
                between, to_reward = (v @ v.T)[~torch.eye(rounds, dtype=bool)], v @ truth
                table.append((scheduler.timesteps[steps].tolist(), naive, between.mean().item(), to_reward.mean().item(), (to_reward.std() / rounds ** .5).item()))
            done.write_text(json.dumps(dict(halves=(halves[0] @ halves[1]).item(), table=table)) + "\n")
        halves, table = json.loads(done.read_text()).values()
        for (t, _, *naive), (_, _, *fused) in zip(table[::2], table[1::2]):
            lines.append(f"| {scale}, {T} | {t[0]}" + (f" to {t[-1]}" if len(t) > 1 else "")
                         + "".join(f" | {a:+.2f} | {b:+.3f} ± {c:.3f}" for a, b, c in (naive, fused)) + " |")
        notes.append(f"guidance {scale}: the reward's gradient over one half of its images and over the other: cosine {halves:+.2f}")
    return lines + notes


def dfusion(out, jobs):
    """The pairs, the gradients, and the training."""
    out.mkdir(parents=True, exist_ok=True)
    lines = [*pairs_measured(out), *gradients(out), *training(out, jobs)]
    (out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
