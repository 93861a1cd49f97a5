"""The golden runner itself: it finds what there is, and passes nothing that it has not compared."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.golden.__main__ import main
from tests.golden.comparison import Comparison, Tolerances
from tests.golden.runner import Row, run

DATA = Path(__file__).parents[2] / "golden/data/infinity"
GREEDY, SAMPLED = "e_ar_d16_h1.500_layercfg_negprompt_b2", "e_ar_d16_h1.000_sampled_default"
QUANTIZER, CORRECTION, TRAINING = "a_bsq_d16_h1.500", "c_bsc_d16_h1.500_first3", "d_train_d16_h1.000"
WEIGHTS = {GREEDY: ("b_vae_d16", TRAINING), SAMPLED: ("b_vae_d16", TRAINING)}

Tamper = Callable[[dict[str, Tensor], dict[str, object]], None]


def _put(folder: Path, name: str, tamper: Tamper | None = None) -> Path:
    """A golden of the data in another folder, changed; and the weights it needs beside it, unseen by the runner."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors, side_car = load_file(DATA / f"{name}.safetensors"), json.loads((DATA / f"{name}.json").read_text("utf-8"))
    if tamper is not None:
        tamper(tensors, side_car)
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(side_car), "utf-8")
    for weights in WEIGHTS.get(name, ()):
        shutil.copyfile(DATA / f"{weights}.safetensors", folder / f"{weights}.safetensors")
    return folder


def _only_row(folder: Path) -> Row:
    (row,) = run(folder)
    return row


def test_goldens_are_found_at_any_depth_by_kind_not_by_name(tmp_path: Path) -> None:
    deep = _put(tmp_path / "one/two/three", "g_topk_topp")
    for ending in ("json", "safetensors"):
        (deep / f"g_topk_topp.{ending}").rename(deep / f"another.name.{ending}")
    _put(tmp_path / "four", CORRECTION)
    (tmp_path / "notes.json").write_text('{"family tree": []}')
    rows = list(run(tmp_path))
    assert [(row.file, row.outcome) for row in rows] == [
        (f"four/{CORRECTION}", "yes"),
        ("one/two/three/another.name", "yes"),
    ]
    assert main([str(tmp_path)]) == 0


def _nudge(name: str, amount: float = 1e-2) -> Tamper:
    def tamper(tensors: dict[str, Tensor], _side_car: dict[str, object]) -> None:
        flat = tensors[name].flatten()
        flat[-1] = 1 - flat[-1] if flat.dtype == torch.uint8 and flat[-1] < 2 else flat[-1] + amount
        tensors[name] = flat.view(tensors[name].shape)

    return tamper


def _set(**fields: object) -> Tamper:
    def tamper(_tensors: dict[str, Tensor], side_car: dict[str, object]) -> None:
        for place, value in fields.items():
            holder, _, field = place.rpartition("__")
            inner = side_car[holder] if holder else side_car
            assert isinstance(inner, dict)
            inner[field] = value

    return tamper


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        (QUANTIZER, "s03.bits"),
        (QUANTIZER, "s02.residual"),
        (QUANTIZER, "s01.next_input_area"),
        (QUANTIZER, "quantized_out"),
        (QUANTIZER, "summed_codes_from_bits"),
        (QUANTIZER, "grad_latent"),
        (QUANTIZER, "soft_entropy.codebook"),
        ("b_vae_d16", "case1.s02.bits"),
        ("b_vae_d16", "case0.decoded_unclamped"),
        ("b_vae_d16", "case1.raw_features"),
        ("b_vae_d16", "case0.image"),
        (CORRECTION, "gt_labels"),
        (CORRECTION, "s06.gt_bits"),
        (CORRECTION, "x_BLC_wo_prefix"),
        (CORRECTION, "s01.flip_mask"),
        (TRAINING, "logits"),
        (TRAINING, "token_loss"),
        (TRAINING, "loss_reweighted_by_scale"),
        (TRAINING, "grad.head.bias"),
        (TRAINING, "ca_kv"),
        (TRAINING, "state.block_chunks.1.module.1.ffn.fc2.bias"),
        (GREEDY, "s00.logits"),
        (GREEDY, "s05.bits"),
        (GREEDY, "s06.summed_codes"),
        (GREEDY, "s02.next_input"),
        (GREEDY, "final_latent"),
        (GREEDY, "image_float_topleft64"),
        ("f_rope2d", "index.h1.250"),
        ("f_rope2d", "table.dim16.h1.500.mode1"),
        ("f_rope2d", "apply.h1.500.scale4.k_rot"),
        ("g_topk_topp", "case0.filtered_logits"),
        ("g_topk_topp", "case0.probs"),
        ("j_image_transform", "transform2.output_first8rows"),
    ],
)
def test_a_golden_that_was_tampered_with_fails(tmp_path: Path, name: str, tensor: str) -> None:
    amount = 1.0 if "index" in tensor else 2e-2
    row = _only_row(_put(tmp_path, name, _nudge(tensor, amount)))
    assert row.outcome == "no"
    assert row.note
    assert main([str(tmp_path)]) == 1


@pytest.mark.parametrize(
    ("name", "fields", "reason"),
    [
        (TRAINING, {"config__swiglu": True}, "swiglu"),
        (TRAINING, {"config__shared_aln": False}, "shared_aln"),
        (TRAINING, {"config__norm_eps": 1e-5}, "norm_eps"),
        (TRAINING, {"config__drop_path_rate": 0.1}, "drop path"),
        (TRAINING, {"config__rope2d_normalized_by_hw": 3}, "rotary mode 3"),
        (GREEDY, {"gt_leak": 2}, "given bits"),
        (GREEDY, {"cfg_insertion_layer": [0, -2]}, "guidance at layers"),
        (CORRECTION, {"vae_scale_schedule_thw": [[1, 1, 1], [2, 4, 4]]}, "more than one frame"),
        ("j_image_transform", {"kind": "j: streaming order"}, "streaming order"),
        ("h_ema", {"kind": "h: learning-rate schedule"}, "learning rate"),
        (QUANTIZER, {"kind": "z: something new"}, ""),
        (QUANTIZER, {"family": "unheard-of"}, ""),
    ],
)
def test_what_the_product_cannot_do_is_not_yet(
    tmp_path: Path, name: str, fields: dict[str, object], reason: str
) -> None:
    row = _only_row(_put(tmp_path, name, _set(**fields)))
    assert row.outcome == "not yet"
    assert reason in row.note
    assert main([str(tmp_path)]) == 0


def test_a_setting_that_is_wrong_fails(tmp_path: Path) -> None:
    """The side-car is what is gone by: other rotary modes, guidance or temperatures give other numbers."""
    for index, (name, fields) in enumerate(
        [
            (TRAINING, {"config__rope2d_normalized_by_hw": 0}),
            (TRAINING, {"config__rope2d_each_sa_layer": 0}),
            (TRAINING, {"config__add_lvl_embeding_only_first_block": 0}),
            (TRAINING, {"cond_drop_uniforms": [0.5, 0.5]}),
            (TRAINING, {"text_lens": [9, 5]}),
            (TRAINING, {"grad_norm_per_parameter": {"head.bias": 0.079}}),
            (GREEDY, {"cfg_list": 3.0}),
            (GREEDY, {"cfg_insertion_layer": 0}),
            (SAMPLED, {"top_p": 0.5}),
            (SAMPLED, {"cfg_list": [1.0]}),
            (CORRECTION, {"noise_apply_requant": 0}),
        ]
    ):
        assert _only_row(_put(tmp_path / str(index), name, _set(**fields))).outcome == "no", fields


def test_broken_goldens_fail_with_a_reason(tmp_path: Path) -> None:
    _put(tmp_path / "truncated", QUANTIZER)
    tensors = tmp_path / "truncated" / f"{QUANTIZER}.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:5000])
    _put(tmp_path / "missing", QUANTIZER)
    (tmp_path / "missing" / f"{QUANTIZER}.safetensors").unlink()
    _put(tmp_path / "side-car", QUANTIZER)
    side_car = tmp_path / "side-car" / f"{QUANTIZER}.json"
    side_car.write_text(side_car.read_text("utf-8")[:300], "utf-8")
    _put(tmp_path / "field", QUANTIZER, _set(scale_schedule_thw="square"))
    _put(tmp_path / "tensor", QUANTIZER, lambda tensors, _: tensors.__delitem__("latent"))
    _put(tmp_path / "weights", GREEDY)
    (tmp_path / "weights" / f"{TRAINING}.safetensors").unlink()
    reasons = {row.file.split("/")[0]: row.note for row in run(tmp_path) if row.outcome == "no"}
    expected = {
        "truncated": "cannot be read",
        "missing": "is missing",
        "side-car": "side-car cannot be read",
        "field": "scale_schedule_thw",
        "tensor": "tensor 'latent' is missing",
        "weights": f"{TRAINING}.safetensors is missing",
    }
    assert reasons.keys() == expected.keys()
    for folder, words in expected.items():
        assert words in reasons[folder]
        assert "\n" not in reasons[folder]


def test_missing_optional_parts_are_no_failure(tmp_path: Path) -> None:
    """Only what is recorded is compared."""

    def thin(tensors: dict[str, Tensor], side_car: dict[str, object]) -> None:
        for name in [name for name in tensors if name.endswith(("summed_codes", "next_input")) or "image" in name]:
            del tensors[name]
        side_car.update(vae_config=None, vae_state_in=None, image_float_stats={})

    row = _only_row(_put(tmp_path, GREEDY, thin))
    assert row.outcome == "yes", row.note


def test_weights_may_lie_in_the_golden_itself(tmp_path: Path) -> None:
    def merge(tensors: dict[str, Tensor], side_car: dict[str, object]) -> None:
        state = load_file(DATA / f"{TRAINING}.safetensors")
        tensors.update({name: value for name, value in state.items() if name.startswith("state.")})
        side_car["state_in"] = None

    _put(tmp_path, SAMPLED, merge)
    (tmp_path / f"{TRAINING}.safetensors").unlink()
    row = _only_row(tmp_path)
    assert row.outcome == "yes", row.note


def test_cases_may_have_names(tmp_path: Path) -> None:
    """Listed with a name each, or as a mapping, in any order."""

    def rename(tensors: dict[str, Tensor], side_car: dict[str, object]) -> None:
        cases = side_car["cases"]
        assert isinstance(cases, list)
        names = [f"{letter}-{index}" for index, letter in enumerate("zyxwvuts")]
        for name in list(tensors):
            case, _, leaf = name.partition(".")
            tensors[f"{names[int(case.removeprefix('case'))]}.{leaf}"] = tensors.pop(name)
        side_car["cases"] = dict(zip(names, cases, strict=True))

    row = _only_row(_put(tmp_path, "g_topk_topp", rename))
    assert row.outcome == "yes", row.note


@pytest.mark.parametrize("inhabited", [True, False])
def test_nothing_recognised_exits_2(tmp_path: Path, inhabited: bool, capsys: pytest.CaptureFixture[str]) -> None:
    if inhabited:
        (tmp_path / "facts.json").write_text('{"models": {}}')
        (tmp_path / "list.json").write_text("[1, 2]")
    assert main([str(tmp_path)]) == 2
    assert main([str(tmp_path / "absent")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_the_table_names_file_kind_error_tolerance_and_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _put(tmp_path / "fine", CORRECTION)
    _put(tmp_path / "spoilt", CORRECTION, _nudge("x_BLC_wo_prefix"))
    assert main([str(tmp_path)]) == 1
    heading, fine, spoilt, *_ = capsys.readouterr().out.splitlines()
    assert heading.split("  ")[0] == "file"
    for words in ("kind", "largest error", "tolerance", "ok"):
        assert words in heading
    assert "1e-05" in fine
    assert "yes" in fine
    assert "0.01" in spoilt
    assert "x_BLC_wo_prefix" in spoilt


def test_tolerances_are_read_from_words() -> None:
    words = Tolerances("bits exact (see margins, 3e-4); floats 1e-3 absolute, u8 +-1")
    assert (words.get("floats", default=0), words.get("uint8", default=0)) == (1e-3, 1)
    words = Tolerances("logits 2e-4 absolute, loss 1e-5, gradient norms 1e-3 relative")
    assert [words.get(name, default=9) for name in ("logits", "loss", "gradient", "floats")] == [2e-4, 1e-5, 1e-3, 9]
    assert Tolerances("1e-6").get("floats", default=9) == 1e-6
    assert Tolerances({"atol": 1e-4, "uint8": 2}).get("uint8", default=9) == 2
    assert Tolerances({"atol": 1e-4, "uint8": 2}).get("logits", default=9) == 1e-4
    assert Tolerances(None).get("floats", default=9) == 9


def test_comparisons_never_pass_by_accident() -> None:
    comparison = Comparison()
    comparison.close("shape", torch.zeros(2), torch.zeros(3), 1)
    comparison.close("broadcast", torch.zeros(1), torch.zeros(3), 1)
    comparison.close("nothing", torch.zeros(0), torch.zeros(0), 1)
    comparison.close("not a number", torch.tensor([0.0, torch.nan]), torch.zeros(2), 1)
    comparison.close("infinite", torch.tensor([torch.inf]), torch.zeros(1), 1)
    comparison.equal("bits", torch.tensor([True, False]), torch.tensor([1, 1], dtype=torch.uint8))
    comparison.relative("zero", torch.tensor([1e-3]), torch.zeros(1), 1e-3)
    assert [finding.name for finding in comparison.failures] == [finding.name for finding in comparison.findings]
    assert comparison.worst.severity == torch.inf
    comparison = Comparison()
    comparison.close("equal infinities", torch.tensor([-torch.inf]), torch.tensor([-torch.inf]), 0)
    comparison.relative("both zero", torch.zeros(3), torch.zeros(3), 1e-3)
    assert comparison.failures == []
