"""The plan of one config, as one object and as a table for people."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from dr_jax.engine import decode
from dr_jax.model import joined, letters, weights
from dr_jax.plan.estimate import GIB, KERNEL_EFFICIENCY, Compiled, Traced, bytes_per_chip, compile_for, trace
from dr_jax.plan.programs import Program, Resident, Setup, programs, resident

LEARNER, UPDATE = "learner_step", "learner_update"  # the second where a step comes in parts


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of each program; `compiled` is empty without a compiler."""

    setup: Setup
    resident: Resident
    programs: dict[str, Program]
    traced: dict[str, Traced]
    compiled: dict[str, Compiled]


def make(setup: Setup, *, compiler: bool) -> Plan:
    """Traces and, with a compiler, compiles every program, one at a time."""
    by_name = {program.name: program for program in programs(setup)}
    traced = {name: trace(program) for name, program in by_name.items()}
    compiled = {}
    if compiler:
        compiled = {name: compile_for(by_name[name], traced[name], setup.piece) for name in by_name}
    return Plan(setup, resident(setup), by_name, traced, compiled)


def hbm_gib(plan: Plan) -> dict[str, float]:
    """GiB on the fullest chip, which has an engine, at the worst moment. Without a compiler, temporaries are left out.

    Activations are what the backward pass finds stored, by arithmetic; temporaries are the rest of what the compiler
    asks for in its most demanding program.
    """
    there = plan.resident
    kinds = {
        "params": bytes_per_chip(there.state.params),
        "optimizer": bytes_per_chip(there.state.opt_state),
        "reference": bytes_per_chip(there.reference),
        "engine_params": bytes_per_chip(there.engine_params),
        "kv_cache": bytes_per_chip(there.kv_cache),
        "batch": bytes_per_chip(there.batch),
        "activations": _activation_bytes(plan),
    }
    if there.gradients is not None:
        kinds["gradients"] = bytes_per_chip(there.gradients)
    worst = max((compiled.temp_bytes for compiled in plan.compiled.values()), default=0)
    kinds["temporaries"] = max(worst - kinds["activations"], 0)
    if plan.compiled:  # where another program is the most demanding, what the learner stores is part of it
        kinds["activations"] = min(kinds["activations"], worst)
    gib = {kind: size / GIB for kind, size in kinds.items()}
    return gib | {"total": sum(gib.values()), "limit": float(plan.setup.piece.chip.hbm_gib)}


def summary(plan: Plan, config: str) -> dict[str, Any]:
    """The object of `--json`: figures are None where no compiler was there to give them."""
    hbm = hbm_gib(plan)
    failed = any(compiled.failure for compiled in plan.compiled.values())
    known = bool(plan.compiled) and not failed
    return {
        "config": config,
        "topology": plan.setup.run.topology,
        "chips": plan.setup.piece.chips,
        "fits": (hbm["total"] <= hbm["limit"]) if known else (False if failed else None),
        "hbm_gib_per_chip": {kind: round(size, 3) for kind, size in hbm.items()},
        "predicted_step_s": round(_step_s(plan), 3) if known else None,
        "predicted_mfu": round(mfu(plan), 4) if known else None,
        "collective_gb_per_chip": round(sum(map(_wire, _step(plan))) / 1e9, 3) if known else None,
        "compile_s": round(sum(each.compile_s for each in plan.compiled.values()), 1) if plan.compiled else None,
        "programs": {name: _program(plan, name) for name in plan.programs},
    }


def mfu(plan: Plan) -> float:
    """Model FLOPs of the learner step over what the chips could do in the predicted time. See `model_flops`."""
    piece = plan.setup.piece
    share = model_flops(plan.setup) / (_step_s(plan) * piece.chips * piece.chip.flops_per_s)
    if share > 1:
        raise AssertionError(f"MFU of {share:.0%}: faster than the chips; the compiled module was not read whole")
    return share


def model_flops(setup: Setup) -> float:
    """FLOPs that the step cannot do without: forward, backward (twice that), and the reference's forward where there
    is one; causal attention; all rows full, nothing computed twice."""
    model, batch = setup.model, setup.run.batch
    lookup = 0 if model.tie_embeddings else model.vocab_size * model.d_model  # a look-up multiplies nothing
    attention = 2 * model.num_layers * model.num_heads * model.head_dim * batch.row_tokens
    per_token = 2 * (weights.count(model) - lookup) + attention
    passes = 4 if setup.run.grpo.kl_coef else 3
    return float(passes * per_token * batch.rows * batch.row_tokens)


def advice(plan: Plan) -> str:
    """What to change where it does not fit."""
    hbm = hbm_gib(plan)
    remedies = {
        "kv_cache": "lower config.engine.pages, and config.engine.slots with it",
        "engine_params": "raise config.engine.tensor, up to the kv heads and the chips of a host",
        "params": "raise config.mesh.fsdp (a larger slice)",
        "optimizer": "raise config.mesh.fsdp (a larger slice)",
        "reference": "raise config.mesh.fsdp, or set config.grpo.kl_coef=0",
        "batch": "lower config.batch.rows",
        "gradients": "set config.batch.parts=1",
        "activations": "lower config.batch.micro_rows, or set config.model.remat='full'",
        "temporaries": "lower config.batch.micro_rows, config.engine.prefill_rows or config.batch.row_tokens",
    }
    largest = sorted(filter(hbm.__contains__, remedies), key=hbm.__getitem__, reverse=True)[:2]
    return "; ".join(f"{kind} ({hbm[kind]:.1f} GiB): {remedies[kind]}" for kind in largest)


def table(plan: Plan, config: str) -> str:
    """The plan for people."""
    return "\n".join([*_heading(plan, config), *_program_lines(plan), "", *_verdict(plan)])


def layout(setup: Setup, config: str) -> str:
    """What lies where, and nothing of what is done with it: the heading of `table`, and `shapes`. Traces nothing."""
    plan = Plan(setup, resident(setup), {}, {}, {})
    return "\n".join([*_heading(plan, config), shapes(plan)])


def _heading(plan: Plan, config: str) -> list[str]:
    setup, piece = plan.setup, plan.setup.piece
    batch, mesh = setup.run.batch, setup.run.mesh
    return [
        f"{config}: {setup.run.model.path} on {piece.name} ({piece.product}, {piece.chips} chips), mesh "
        + " ".join(f"{axis}={size}" for axis, size in mesh.items())
        + f", engine of {setup.run.engine.tensor} chips",
        f"{batch.rows} rows x {batch.row_tokens} tokens in micro-batches of {batch.micro_rows}, all rows full; "
        f"remat {setup.run.model.remat}, attention {setup.run.model.attention}",
        "",
        "HBM of a chip, GiB",
        *(f"  {kind:<14}{size:>9.2f}" for kind, size in hbm_gib(plan).items()),
        "",
    ]


def shapes(plan: Plan) -> str:
    """Every array that outlives a program: shape, letters, placement and bytes a chip."""
    setup, there = plan.setup, plan.resident
    rows = [("array", "shape", "letters", "placement", "bytes a chip")]
    learners = {row.path: row.letters for row in weights.rows(setup.model)}
    places = [
        ("params", there.state.params, learners, setup.rules),
        ("engine", there.engine_params, joined.letters(setup.model), letters.DEFAULT_RULES),
    ]
    for owner, tree, by_path, rules in places:
        for path, row_letters in by_path.items():
            leaf = functools.reduce(dict.__getitem__, path.split("/"), tree)
            rows.append(_shape_row(f"{owner}/{path}", leaf, row_letters, letters.spec(row_letters, rules.weights)))
    pool = decode.ATTENTION[setup.run.engine.attention].pool
    for leaf, row_letters in zip(*map(jax.tree.leaves, (there.kv_cache, pool)), strict=True):
        spec = letters.spec(row_letters, letters.DEFAULT_RULES.activations)
        rows.append(_shape_row("cache", leaf, row_letters, spec))
    for name, leaf in zip(there.batch._fields, there.batch, strict=True):
        rows.append(_shape_row(f"batch/{name}", leaf, "bt", letters.spec("bt", setup.rules.activations)))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    note = "Adam's two moments lie as params do, the reference model too (in its own dtype)."
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
                     for row in rows) + f"\n{note}"  # fmt: skip


def _shape_row(name: str, leaf: Any, row_letters: str, spec: Any) -> tuple[str, ...]:
    placed = ", ".join("-" if entry is None else "+".join(letters.axes_of(entry)) for entry in spec)
    shape = f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
    return name, shape, row_letters, f"({placed})", f"{bytes_per_chip(leaf):,}"


def _activation_bytes(plan: Plan) -> int:
    """What the backward pass of one micro-batch finds stored: each layer's input, and what remat adds to it by name.

    What 'dots' and 'none' add is left to the temporaries."""
    setup, run, model = plan.setup, plan.setup.run, plan.setup.model
    placed = setup.rules.activations

    def share(size: int, letter: str) -> int:
        return size // math.prod(run.mesh[axis] for axis in letters.axes_of(placed[letter]))

    attended, d = share(model.num_heads, "n") * model.head_dim, share(model.d_model, "d")
    kv = share(model.num_kv_heads, "k") * model.head_dim
    rest = attended + 2 * kv + d  # q, k, v, and the sum after attention
    mlp = 2 * share(model.d_ff, "f")
    extra = dict(attention=0, projections=rest, mlp=mlp, products=mlp + rest)
    width = d + (attended + extra[run.model.remat] if run.model.remat in extra else 0)
    tokens = share(run.batch.micro_rows, "b") * run.batch.row_tokens
    return tokens * width * model.num_layers * jnp.dtype(run.model.dtype).itemsize


def _step(plan: Plan) -> list[Compiled]:
    """The compiled programs that a step of the learner runs."""
    return [plan.compiled[name] for name in (LEARNER, UPDATE) if name in plan.compiled]


def _step_s(plan: Plan) -> float:
    return sum(each.step_s for each in _step(plan))


def _wire(compiled: Compiled) -> float:
    return sum(sent for _, sent in compiled.collectives.values())


def _program(plan: Plan, name: str) -> dict[str, Any]:
    program, traced, piece = plan.programs[name], plan.traced[name], plan.setup.piece
    flops = traced.flops.total / program.mesh.size
    found: dict[str, Any] = {"flops_per_chip": flops, "ideal_s": round(flops / piece.chip.flops_per_s, 6)}
    compiled = plan.compiled.get(name)
    if compiled is None:
        return found
    found |= {"compile_s": round(compiled.compile_s, 1)}
    if compiled.failure:
        return found | {"failure": compiled.failure}
    roofline_s = max(flops / piece.chip.flops_per_s, _read_bytes(program) / piece.chip.hbm_bytes_per_s)
    return found | {
        "roofline_s": round(roofline_s, 6),
        "predicted_s": round(compiled.step_s, 6),
        "seconds": {term: round(value, 6) for term, value in compiled.seconds.items()},
        "temporary_gib": round(compiled.temp_bytes / GIB, 3),
        "donated_gib": round(compiled.alias_bytes / GIB, 3),
        "hbm_gb_moved": round(compiled.hbm_bytes / 1e9, 3),
        "collectives": {
            kind: {"runs": runs, "gb_sent": round(sent / 1e9, 3)} for kind, (runs, sent) in compiled.collectives.items()
        },
    }


def _read_bytes(program: Program) -> int:
    """Bytes that one chip must read at the least: all arguments, once a pass; of the cache what its rows have there."""
    read = [program.reads * bytes_per_chip(tree) for tree in program.args]
    if program.paged:
        read[1] = min(read[1], int(program.paged.hbm_bytes))
    return sum(read)


def _program_lines(plan: Plan) -> list[str]:
    lines = ["program        TFLOP/chip  roofline s  predicted s   = matrix + memory + kernels + exposed  compile s"]
    for name in plan.programs:
        said = _program(plan, name)
        row = f"{name:<14}{said['flops_per_chip'] / 1e12:>11.2f}  "
        if "failure" in said:
            lines.append(f"{row}did not compile: {said['failure']}")
        elif "predicted_s" not in said:
            lines.append(f"{row}{said['ideal_s']:>10.4f}")
        else:
            terms = said["seconds"]
            lines.append(
                f"{row}{said['roofline_s']:>10.4f}  {said['predicted_s']:>11.4f}   "
                + " ".join(f"{terms[term]:>8.4f}" for term in ("matrix", "memory", "kernels", "exposed"))
                + f"  {said['compile_s']:>9.1f}"
            )
            for kind, sent in said["collectives"].items():
                lines.append(f"{'':<14}  {kind}: {sent['runs']} runs, {sent['gb_sent']:.2f} GB sent by each chip")
    return lines


def _verdict(plan: Plan) -> list[str]:
    if not plan.compiled:
        return [
            "Arithmetic only: the TPU compiler (pip install libtpu) was not asked. Temporaries, collectives and times "
            "are not known."
        ]
    said = summary(plan, "")
    if not said["fits"]:
        return ["Does not fit."]
    hbm = hbm_gib(plan)
    spare = 1 - hbm["total"] / hbm["limit"]
    micro_s = said["predicted_step_s"] / plan.programs[LEARNER].dynamic_trips
    return [
        f"Fits, {spare:.0%} of HBM to spare. "
        f"Predicted step {said['predicted_step_s']:.2f} s ({micro_s:.2f} s a micro-batch), "
        f"MFU {said['predicted_mfu']:.1%}",
        "Basis: model FLOPs (forward, backward, the reference's forward; nothing counted twice) over the peak. Time:",
        "the compiler's cycles for matrix work, bytes over bandwidth for the rest, the compiler's schedule of the",
        f"attention kernels (other kernels: an assumed {KERNEL_EFFICIENCY:.0%} of the peak), collectives over the",
        "links they span. Nothing was run on a TPU.",
    ]
