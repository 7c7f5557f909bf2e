"""Which SAEs the options of the command line give."""

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_lens_matryoshka import MatryoshkaTrainingSAEConfig
from sae_lens_matryoshka.synthetic.models import TOY
from sae_lens_matryoshka.synthetic.variants import level_widths, plan_variants

ALL = ["l1", "batchtopk", "matryoshka_batchtopk", "matryoshka"]


def test_base_variants_take_the_benchmarks_settings():
    l1, batchtopk, reference, own = (v.cfg for v in plan_variants(TOY, ALL))
    assert [v.name for v in plan_variants(TOY, ALL)] == ALL
    assert l1.architecture() == "standard"
    assert l1.l1_coefficient == TOY.l1_coefficient
    assert batchtopk.k == reference.k == own.k == TOY.k
    assert reference.matryoshka_widths == own.matryoshka_widths == list(TOY.matryoshka_widths)
    assert {cfg.d_sae for cfg in (l1, batchtopk, reference, own)} == {20}


def test_any_registered_architecture():
    (variant,) = plan_variants(TOY, ["gated"])
    assert variant.cfg.architecture() == "gated"
    assert variant.cfg.l1_coefficient == TOY.l1_coefficient


def test_varied_fields_are_combined():
    vary = ["k=1,1.5", "matryoshka_widths=5/20,10/20", "use_matryoshka_aux_loss=true"]
    variants = {v.name: v.cfg for v in plan_variants(TOY, ALL, vary)}
    own = "matryoshka,k={},matryoshka_widths={},use_matryoshka_aux_loss=true"
    assert list(variants) == [
        "l1",
        "batchtopk,k=1",
        "batchtopk,k=1.5",
        "matryoshka_batchtopk,k=1",
        "matryoshka_batchtopk,k=1.5",
        *(own.format(k, widths) for k in ("1", "1.5") for widths in ("5-20", "10-20")),
    ]
    last = variants[own.format("1.5", "10-20")]
    assert (last.k, last.matryoshka_widths) == (1.5, [10, 20])
    assert last.use_matryoshka_aux_loss is True
    assert variants["batchtopk,k=1.5"].k == 1.5
    assert variants["batchtopk,k=1"].k == 1


def test_one_at_a_time_varies_each_field_alone_after_the_defaults():
    vary = ["stop_gradient=inner,all", "k=1,1.5", "level_weights=0.5"]
    variants = plan_variants(TOY, ["l1", "batchtopk", "matryoshka"], vary, one_at_a_time=True)
    assert [v.name for v in variants] == [
        "l1",
        "batchtopk",
        "batchtopk,k=1",
        "batchtopk,k=1.5",
        "matryoshka",
        "matryoshka,stop_gradient=inner",
        "matryoshka,stop_gradient=all",
        "matryoshka,k=1",
        "matryoshka,k=1.5",
        "matryoshka,level_weights=0.5",
    ]
    by_name = {v.name: v.cfg for v in variants}
    assert by_name["matryoshka,k=1"].stop_gradient == "none"
    assert by_name["matryoshka,stop_gradient=all"].k == TOY.k
    assert by_name["matryoshka,level_weights=0.5"].level_weights == 0.5


def test_recommended_is_the_recipe_at_the_benchmarks_size():
    (variant,) = plan_variants(TOY, ["recommended"])
    expected = MatryoshkaTrainingSAEConfig.recommended(
        d_in=20,
        d_sae=20,
        k=TOY.k,
        n_steps=TOY.n_samples // TOY.batch_size,
        matryoshka_widths=list(TOY.matryoshka_widths),
    )
    assert variant.cfg.to_dict() == expected.to_dict()
    varied = plan_variants(TOY, ["recommended"], ["k=1,3"])
    assert [(v.cfg.k, v.cfg.k_start) for v in varied] == [(1, 2), (3, 6)]
    assert expected.to_dict() != plan_variants(TOY, ["matryoshka"])[0].cfg.to_dict()


def test_exponents_without_a_dot_are_numbers():
    (variant,) = plan_variants(TOY, ["matryoshka"], ["aux_loss_coefficient=3e-2"])
    assert variant.cfg.aux_loss_coefficient == 0.03


def test_levels():
    variants = plan_variants(TOY, ["matryoshka"], ["levels=1,3,5,10"])
    assert [v.cfg.matryoshka_widths for v in variants] == [
        [20],
        [2, 8, 20],
        [1, 2, 4, 9, 20],
        list(range(2, 21, 2)),
    ]
    # The paper's split, of 65,536 latents.
    assert level_widths(5, 65536) == [2048, 6144, 14336, 30720, 65536]


@given(d_sae=st.integers(1, 5000), share=st.floats(0, 1))
def test_level_widths_increase_to_d_sae(d_sae, share):
    n_levels = 1 + int(share * (d_sae - 1))
    widths = level_widths(n_levels, d_sae)
    assert len(widths) == n_levels
    assert widths[-1] == d_sae
    assert all(inner < outer for inner, outer in pairwise([0, *widths]))


@pytest.mark.parametrize(
    ("names", "vary", "message"),
    [
        (["batchtop"], [], "variant 'batchtop' is not accepted: give one of "),
        (["l1", "l1"], [], "variant l1 is given twice"),
        (["matryoshka"], ["matryoshka_width=3/20"], "did you mean matryoshka_widths?"),
        (["matryoshka"], ["d_sae=40"], "d_sae is not a field"),
        (["matryoshka"], ["k"], "give k=value,value,…"),
        (["matryoshka"], ["k=1,,2"], "give k=value,value,…"),
        (["matryoshka"], ["k=one"], "k='one' is not accepted: give a valid number"),
        (["matryoshka"], ["k=30"], "at most d_sae=20"),
        (["matryoshka"], ["k=[1,2]"], "k='[1' is not accepted: give a valid number"),
        (["matryoshka"], ["k=1", "k=2"], "--vary 'k=2' is not accepted: k is varied twice"),
        (["matryoshka"], ["k=1,1"], "variant matryoshka,k=1 is given twice"),
        (["matryoshka"], ["levels=2.5"], "levels=2.5 is not accepted: give a valid integer"),
        (["matryoshka"], ["levels=21"], "levels=21 is not accepted: give 1 to d_sae=20"),
        (["matryoshka"], ["levels=2", "matryoshka_widths=5/20"], "vary only one"),
        (["batchtopk"], ["levels=2"], "add matryoshka to --variants"),
        (["matryoshka_topk"], [], "k=1.12 is not accepted: give an integer for matryoshka_topk"),
        (["matryoshka"], ["reshape_activations=hook_z"], "reshape_activations is not a field"),
        (["l1"], ["k=1"], "it varies none of l1"),
        (
            ["matryoshka"],
            ["normalize_activations=expected_average_only_in"],
            "normalize_activations='expected_average_only_in' is not accepted",
        ),
    ],
)
def test_mistakes(names, vary, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        plan_variants(TOY, names, vary)
