"""A component's package with fewer bits, in the place of the one with 16."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping

from diffusion_convert.checkpoint import torch_networks
from diffusion_convert.conversion.job import Job, Record
from diffusion_convert.conversion.plan import Plan
from diffusion_convert.palettize.checked import palettize_checked
from diffusion_convert.palettize.outputs import Samples
from diffusion_convert.palettize.palettize_options import PalettizeOptions
from diffusion_convert.palettize.recipe import mix
from diffusion_convert.verification import compare
from diffusion_runtime.errors import InputError
from diffusion_runtime.memory import release
from diffusion_runtime.mil.package import open_package


def palettize(job: Job, record: Record, outputs: Samples | None) -> Record:
    """The package with palettized weights in place of the package. Its PSNR is against the 16-bit package, which
    makes ``outputs`` of the reference's inputs where that is known."""
    asked = _options(job)
    if asked is None or record.component.palettization is not None:
        return record
    started = time.perf_counter()
    checked = palettize_checked(
        job.package,
        job.package,
        asked,
        samples=job.expected.inputs if job.expected else None,
        expected=outputs,
        bounds=job.part.component.min_palettized_psnr_db,
        compare=job.expected is not None,
        known=job.palettes,
        runs=job.runs,
        progress=lambda _, done, total: job.report("palettize", done / total),
    )
    gc.collect()  # both packages' weights stay mapped, the 16-bit ones with no file any more
    release()
    psnr_db = {name: min(compare.BEST_PSNR_DB, value) for name, value in checked.psnr_db.items()}
    changes = {"palettization": checked.report.palettization, "psnr_db": psnr_db}
    small = record.component.model_copy(update=changes)
    return record.model_copy(update={"component": small}).and_seconds("palettize", time.perf_counter() - started)


def _options(job: Job) -> PalettizeOptions | None:
    """Which weights get how many bits; None: none of them."""
    component, options = job.part.component, job.plan.options
    if not component.mixed(options):
        bits = component.bits(options)
        return None if bits is None else PalettizeOptions(bits=bits)
    if job.plan.recipe is not None:
        return job.plan.recipe.options_by_name(open_package(job.package))
    if job.like is not None and job.like.component.palettization is not None:  # weights of all sizes are shared
        return PalettizeOptions(bits_by_weight=job.like.component.palettization.bits_by_weight)
    job.report("palettize", 0.0)
    target = options.target_bits or 0.0

    def choose() -> Mapping[str, int]:
        return mix(job.package, PalettizeOptions(), target).options.bits_by_weight or {}

    chosen = choose() if job.runs is None else job.runs.bits(job.package, target, choose)
    return PalettizeOptions(bits_by_weight=chosen)


def check_recipe(plan: Plan, records: Mapping[str, Record]) -> tuple[str, ...]:
    """A note on what the plan's recipe names and was not converted. Raises InputError where that is all of it."""
    if plan.recipe is None:
        return ()
    made = [records[part.name].component for part in plan.parts if part.component.mixed(plan.options)]
    found = {
        name for component in made if component.palettization for name in component.palettization.bits_by_weight
    }
    idle = sorted(set(plan.recipe.bits) - found)
    if idle and not found:
        raise InputError(
            f"{plan.options.recipe}: names none of the weights that were converted, but "
            f"{torch_networks.listed(idle)}; it was made for {plan.recipe.package}"
        )
    return (f"{plan.options.recipe}: has no use for {torch_networks.listed(idle)}",) if idle else ()
