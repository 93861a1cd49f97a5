"""What an engine does about safety: which mode a request gets, the checker in memory, and each picture's verdict.

A picture that is to be checked is looked at when it is decoded and before anybody is handed it; what is shown of it
earlier is blurred. Whatever keeps the checker from answering fails the request. Everything here but the counters
belongs to the engine's thread. Not here: checkers (`gesso.safety`), how results are told (`loop`, `results`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from gesso.devices import CPU
from gesso.engine.memory import mode_of
from gesso.errors import FileError, MissingError, RequestError
from gesso.memory_modes import FULL
from gesso.pipelines.contract import Output, Pipeline, Plan
from gesso.safety import Checker, Decision, Mode, stricter
from gesso.settings import Settings

if TYPE_CHECKING:
    from PIL.Image import Image

    from gesso.request import GenerationRequest

FAMILY = "safety-checker"
_TOGETHER = 8  # frames of a video that the checker is given at once


class Guard:
    """The safety of one engine.

    Args:
        settings: `safety` and what begins with `safety_`.

    Raises:
        RequestError: less is allowed than is required, or a label without a name.
    """

    def __init__(self, settings: Settings) -> None:
        if settings.safety_required and settings.safety == "off":
            raise RequestError("safety_required", True, "usable with safety off", "set safety to blur or reject")
        self._labels = [label.strip() for label in settings.safety_labels.split(",")]
        if not all(self._labels):
            raise RequestError("safety_labels", settings.safety_labels, "names separated by commas, as in porn,hentai")
        self._settings = settings
        self._checker: Checker | None = None
        self._digest = ""
        self._device = CPU
        self._counts: dict[str, float] = {"off": 0, "passed": 0, "blurred": 0, "rejected": 0}

    def counters(self) -> dict[str, float]:
        """How many pictures and videos there were, by what became of them. From any thread."""
        return dict(self._counts)

    # ---- before a request is taken on ---------------------------------------------------------------------------

    def mode(self, request: GenerationRequest) -> Mode:
        """What becomes of the request's flagged pictures: its own word, unless more is required; else the setting."""
        asked, least = request.safety, self._settings.safety
        if asked is None:
            return least
        return stricter(asked, least) if self._settings.safety_required else asked

    def ready(self, request: GenerationRequest, device: str) -> None:
        """Have the checker in memory, on the device, if the request is checked.

        Raises:
            RequestError, MissingError, FileError, WeightsError: there is none that can be used, and the way out.
        """
        if self.mode(request) == "off" or self._checker is not None:
            return
        from gesso.safety.reading import FILES, read_checker
        from gesso.weights.files import digest

        folder = self._folder()
        checker = read_checker(folder, device, unsafe=self._labels, threshold=self._settings.safety_threshold)
        self._digest, self._device = f"sha256:{digest(folder / name for name in FILES)}", device
        self._checker = checker

    def foreseen(self, request: GenerationRequest, device: str) -> tuple[Mode, int | None]:
        """The mode that the request's pictures get, and the bytes of the checker's weights on the device: 0 where none
        looks at them, None where it is not here.

        Raises:
            RequestError, FileError, WeightsError: what the settings name is no checker, or is damaged.
        """
        mode = self.mode(request)
        if mode == "off":
            return mode, 0
        from gesso.safety.reading import checker_bytes

        try:
            folder = self._folder(checked=False)
        except MissingError:
            return mode, None
        return mode, checker_bytes(folder, device)

    def _folder(self, *, checked: bool = True) -> Path:
        """Where the checker lies that the settings name; one that was pulled is held against its checksums, if it is to
        be `checked`.
        """
        from gesso.engine.loading import check_pulled
        from gesso.weights import catalogue

        name = self._settings.safety_model
        if name in catalogue.names():
            entry = catalogue.find(name)
            if entry.family != FAMILY:
                raise RequestError("safety_model", name, "a safety checker", f"it is a model of {entry.family}")
            entry.require_files()
            if checked:
                check_pulled(entry)
            return entry.folder
        folder = Path(name).expanduser() if name.startswith(("~/", "~\\")) else Path(name)
        if not folder.is_dir():
            hint = "name its folder, or: gesso models pull stable-diffusion-safety-checker"
            raise FileError(name, "is no safety checker (setting safety_model)", hint)
        return folder

    def settled(self, plan: Plan) -> Plan:
        """The plan with the mode that its pictures get, and a warning where that is not the one asked for."""
        asked, mode = plan.request.safety, self.mode(plan.request)
        filled = replace(plan, request=plan.request.model_copy(update={"safety": mode}))
        if asked is None or asked == mode:
            return filled
        told = f"safety {asked} is not allowed here; {mode} was used (setting safety_required)"
        return replace(filled, warnings=(*filled.warnings, told))

    # ---- when pictures are there --------------------------------------------------------------------------------

    def shown(self, plan: Plan, pictures: Sequence[Image]) -> list[Image]:
        """What may be seen of pictures that nobody has checked: all of them blurred, if the request is checked."""
        if plan.request.safety == "off":
            return list(pictures)
        from gesso.safety.hiding import hidden

        return [hidden(picture) for picture in pictures]

    def judged(self, plan: Plan, output: Output, pipeline: Pipeline) -> tuple[Output | None, dict[str, object]]:
        """What may be seen of a finished picture or video, None for nothing, and what its record says of that.

        Raises:
            RunError: the checker's answer is no number.
        """
        mode = plan.request.safety
        if mode == "off":
            self._counts["off"] += 1
            return output, {"decision": "off"}
        decisions = self._decisions(output, pipeline)
        worst = max(decisions, key=lambda decision: (decision.flagged, decision.score))
        said: dict[str, object] = {"model": self._digest, "score": worst.score}
        if not worst.flagged:
            self._counts["passed"] += 1
            return output, {"decision": "passed", **said}
        said["reason"] = worst.reason
        if mode == "reject":
            self._counts["rejected"] += 1
            return None, {"decision": "rejected", **said}
        self._counts["blurred"] += 1
        frames = tuple(self.shown(plan, output.frames))
        image = frames[0] if frames else self.shown(plan, [output.image])[0]
        return replace(output, image=image, frames=frames), {"decision": "blurred", **said}

    def _decisions(self, output: Output, pipeline: Pipeline) -> list[Decision]:
        """For the picture, or for every so many frames and the last."""
        pictures = [output.image]
        if output.frames:
            chosen = output.frames[:: self._settings.safety_frames]
            pictures = [*chosen, output.frames[-1]]
        with self._present(pipeline) as checker:
            groups = (pictures[first : first + _TOGETHER] for first in range(0, len(pictures), _TOGETHER))
            return [decision for group in groups for decision in checker.check(group)]

    @contextmanager
    def _present(self, pipeline: Pipeline) -> Iterator[Checker]:
        """The checker on its device; afterwards in host memory, where the model's parts rest there too."""
        checker = self._checker
        assert checker is not None, "a checked request is taken on only with a checker"
        checker.network.to(self._device)
        try:
            yield checker
        finally:
            mode = mode_of(pipeline)
            if mode is not None and mode.placement != FULL.placement:
                checker.network.to(CPU)
