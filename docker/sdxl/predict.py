"""Illustrious XL and SDXL as a FLUX-compatible Cog predictor.

Cog wants the inputs as a signature; a test holds it to the table in `gesso.serving.flux_compatible`.
Not here: what fields mean, and all the work (`gesso.serving`).
"""

from cog import BaseRunner, Input, Path, Secret, concurrent

from gesso.serving.flux_compatible import FluxCompatibleInput
from gesso.serving.predictor import FluxCompatiblePredictor


class Predictor(BaseRunner):
    """One engine for all calls; those that overlap share its batches."""

    def setup(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]  (without weights, as Cog allows)
        """Load the default model."""
        self.predictor = FluxCompatiblePredictor()
        self.predictor.warm_up()

    @concurrent(max=4)  # by Cog's build; else COG_MAX_CONCURRENCY says it
    async def run(
        self,
        prompt: str = Input(
            default="An astronaut riding a rainbow unicorn",
            description="What to draw. The default model knows Danbooru's tags best, separated by commas.",
        ),
        num_outputs: int = Input(default=1, ge=1, le=4, description="How many pictures; picture i uses seed + i."),
        aspect_ratio: str = Input(
            default="1:1",
            choices=["1:1", "2:3", "3:2", "4:3", "3:4", "4:5", "5:4", "16:9", "9:16", "21:9", "9:21"],
            description="Width to height.",
        ),
        output_format: str = Input(
            default="webp", choices=["webp", "png", "jpg"], description="File format of the pictures."
        ),
        output_quality: int = Input(
            default=80, ge=0, le=100, description="Quality of webp and jpg; png is always lossless."
        ),
        image: str | None = Input(
            default=None,
            description="Picture to start from: an address or a data URI. It is cut to the size that is painted.",
        ),
        mask: str | None = Input(default=None, description="Where image is painted anew: white is, black stays."),
        prompt_strength: float = Input(
            default=0.8, ge=0, le=1, description="How much of image is painted anew; 1 ignores it."
        ),
        seed: int | None = Input(
            default=None, ge=-1, description="Empty or -1 draws one; the log says which was used."
        ),
        go_fast: bool = Input(default=False, description="Half the steps, but no fewer than 10 of those asked for."),
        guidance: float | None = Input(
            default=None,
            ge=1,
            le=20,
            description="How strongly the prompt pulls; else cfg_scale, else the model's own.",
        ),
        megapixels: str = Input(
            default="1", choices=["0.25", "0.5", "1", "2"], description="About how many million pixels."
        ),
        num_inference_steps: int = Input(default=28, ge=1, le=50, description="Steps from noise to picture."),
        disable_safety_checker: bool = Input(
            default=False, description="Do not look for unsafe pictures; the operator may not allow that."
        ),
        lora_weights: str | None = Input(
            default=None,
            description="LoRA: owner/model of Replicate, huggingface.co/owner/repo, civitai.com/models/ID, an address.",
        ),
        lora_scale: float = Input(default=1.0, ge=-1, le=3, description="How strongly lora_weights acts."),
        extra_lora: str | None = Input(default=None, description="Second LoRA, written like lora_weights."),
        extra_lora_scale: float = Input(default=1.0, ge=-1, le=3, description="How strongly extra_lora acts."),
        hf_api_token: Secret | None = Input(
            default=None, description="Hugging Face's token for this call's LoRAs; sent to it alone and not kept."
        ),
        civitai_api_token: Secret | None = Input(
            default=None, description="CivitAI's token for this call's LoRAs; sent to it alone and not kept."
        ),
        negative_prompt: str | None = Input(
            default=None, description="What to keep away from. Not given, the illustration model has a list of its own."
        ),
        scheduler: str = Input(
            default="K_EULER",
            choices=[
                "DDIM",
                "DPMSolverMultistep",
                "HeunDiscrete",
                "KarrasDPM",
                "K_EULER_ANCESTRAL",
                "K_EULER",
                "PNDM",
                "Euler a",
                "Euler",
                "Euler Karras",
                "Heun",
                "DPM++ 2M",
                "DPM++ 2M Karras",
                "DPM++ 2M SDE",
                "DPM++ 2M SDE Karras",
                "DPM++ SDE",
                "DPM++ SDE Karras",
                "DDPM",
                "DEIS",
                "LMS",
                "LMS Karras",
                "UniPC",
                "LCM",
            ],
            description="How a step is taken.",
        ),
        cfg_scale: float | None = Input(
            default=None, ge=1, le=20, description="Another name of guidance, which goes before it."
        ),
        clip_skip: int = Input(default=0, ge=0, le=2, description="How many of CLIP's last layers are left out."),
        refine: str = Input(
            default="no_refiner",
            choices=["no_refiner", "expert_ensemble_refiner", "base_image_refiner"],
            description="SDXL's refiner takes over the last of the noise, or paints once more over the picture.",
        ),
        high_noise_frac: float = Input(
            default=0.8, ge=0, le=1, description="Share of the noise's way before expert_ensemble_refiner takes over."
        ),
        refine_steps: int | None = Input(
            default=None,
            ge=1,
            description="Steps of base_image_refiner, which takes the last 0.3 of them; else num_inference_steps.",
        ),
        apply_watermark: bool = Input(default=False, description="Add SDXL's invisible watermark."),
        use_standard_sdxl: bool = Input(default=False, description="Paint with SDXL base in place of Illustrious XL."),
        width: int | None = Input(
            default=None, ge=256, le=2048, description="Pixels, a multiple of 8; with height, in place of aspect_ratio."
        ),
        height: int | None = Input(
            default=None, ge=256, le=2048, description="Pixels, a multiple of 8; with width, in place of aspect_ratio."
        ),
        loras: list[str] | None = Input(
            default=None, description="More LoRAs, each written like lora_weights, or as SOURCE::SCALE."
        ),
        guidance_scale: float | None = Input(default=None, ge=1, le=20, description="Another name of guidance."),
        replicate_weights: str | None = Input(default=None, description="Another name of lora_weights."),
        hf_lora: str | None = Input(default=None, description="Another name of lora_weights."),
    ) -> list[Path]:
        """Paint pictures; the log has their seeds and any warnings."""
        values = {name: value for name, value in locals().items() if name != "self"}
        for name in ("hf_api_token", "civitai_api_token"):
            values[name] = values[name] and values[name].get_secret_value()
        made = await self.predictor.run(FluxCompatibleInput.model_validate(values), say=print)
        self.record_metric("seeds", list(made.seeds))
        self.record_metric("warnings", list(made.warnings))
        return [Path(file) for file in made.files]
