"""What a model says of itself, and what apps read there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from diffusion_convert.checkpoint import folding
from diffusion_convert.checkpoint.model import Checkpoint
from diffusion_convert.components.component import Component
from diffusion_convert.conversion.identity import tool_versions
from diffusion_convert.conversion.plan import Plan
from diffusion_runtime import schedulers
from diffusion_runtime.families import TEXT_ENCODERS
from diffusion_runtime.mil.program import Metadata

SCHEDULER_KEYS = ("timestep_spacing", "steps_offset", "set_alpha_to_one")


def metadata(component: Component, plan: Plan) -> Metadata:
    """Of a component's packages; they hand it on to the compiled models."""
    checkpoint, versions = plan.checkpoint, tool_versions()
    return Metadata(
        version=checkpoint.source.revision or checkpoint.name,
        author=f"See the model card of {checkpoint.name}; converted with coreml-sd",
        license=checkpoint.source.license or "see the checkpoint's own",
        user_defined={
            "com.github.apple.coremltools.version": versions["coremltools"],
            "com.github.apple.coremltools.source": f"torch=={versions['torch']}",
            "coreml_sd.version": versions["coreml-sd"],
            "coreml_sd.family": checkpoint.family,
            "coreml_sd.source": checkpoint.source.name,
            **for_guernika(component, checkpoint),
        },
    )


def for_guernika(component: Component, checkpoint: Checkpoint) -> dict[str, str]:
    """What Guernika's apps look for, under their names; each has a default there, which is often wrong. The values
    are those of the models as they are, whatever was folded."""
    return {
        "prediction_type": folding.prediction(checkpoint),
        "scaling_factor": f"{folding.latents(checkpoint)[0]:g}",
        **dict(_of_scheduler(checkpoint)),
        **dict(_of_network(component, checkpoint)),
    }


def _of_scheduler(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """As diffusers' pipeline uses them: what the file leaves out is the scheduler's default."""
    own = checkpoint.schedulers["scheduler"]
    imposed = schedulers.imposed_on(checkpoint.family, checkpoint.takes_guidance)
    used: Mapping[str, Any] = {**schedulers.settled(own, imposed), **schedulers.build(own, None, imposed).config}
    for key in SCHEDULER_KEYS:
        if used.get(key) is not None:
            yield key, str(used[key]).lower()


def _of_network(component: Component, checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    if component.name in TEXT_ENCODERS:
        yield "hidden_size", str(checkpoint.models[component.subfolder].config["hidden_size"])
    if checkpoint.pipeline_config.get("requires_aesthetics_score"):
        yield "requires_aesthetics_score", "true"
