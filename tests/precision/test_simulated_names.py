"""What is said of layers at the start of a fit: names in groups, what was left out, and patterns that do nothing."""

import warnings

import pytest
from precision.simulated_runs import INT8
from torch import nn

from lightning_stable.functional.simulated import convert, layer_names
from lightning_stable.precision import simulated
from lightning_stable.precision._names import grouped, layers_line, unused_patterns
from lightning_stable.precision.simulated import SimulatedPrecision
from lightning_stable.testing.harness import Net, fit


def blocks():
    block = lambda: nn.ModuleDict({"q_proj": nn.Linear(2, 2), "norm": nn.LayerNorm(2)})  # noqa: E731
    return nn.ModuleDict({"layers": nn.ModuleList([block() for _ in range(3)]), "lm_head": nn.Linear(2, 2)})


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ([], "none"),
        (["head"], "head"),
        (["body.0", "body.2", "head"], "body.{0,2}, head"),
        ([f"layers.{i}.q" for i in (0, 1, 2, 3, 5)], "layers.{0..3,5}.q"),
        (["a.0", "a.1"], "a.{0,1}"),
        ([f"layers.{i}.mlp.{j}" for i in range(4) for j in (0, 2)], "layers.{0..3}.mlp.{0,2}"),
        (["a.0.b.1", "a.1.b.0"], "a.0.b.1, a.1.b.0"),  # not each with each
        (["layers.7.q", "layers.7.k"], "layers.7.q, layers.7.k"),
    ],
)
def test_names_that_differ_by_numbers_are_one(names, text):
    assert grouped(names) == text


def test_a_long_list_is_cut_short_with_a_count():
    names = [f"part_{letter}.{i}" for letter in "abcdefghijklmnop" for i in range(3)]
    assert grouped(names).endswith("part_l.{0..2} and 12 more")


def test_layers_have_all_their_names():
    shared = nn.Linear(2, 2)
    net = nn.ModuleDict({"one": shared, "other": shared, "norm": nn.LayerNorm(2), "up": nn.Bilinear(2, 2, 2)})
    assert layer_names(net) == {"one": ["one", "other"]}


def test_the_line_has_what_is_converted_and_what_is_not():
    net = blocks()
    net["attention"] = nn.ModuleList([nn.MultiheadAttention(2, 1) for _ in range(2)])
    names = convert(net, include=["*"], exclude=["*head*"])
    line = layers_line(net, names, ["*"], ["*head*"])
    assert line.startswith(
        "Converted: layers.{0..2}.q_proj. Left out: lm_head. Not quantized: 'attention.{0,1}' (nn.Mul"
    )
    assert line.count("MultiheadAttention") == 1


@pytest.mark.parametrize(
    ("include", "exclude", "words"),
    [
        (["*q_proj"], [], []),
        (["*"], ["lm_head", "*norm"], []),  # nothing to convert within a norm
        (["*q_proj", "*k_proj"], [], [["'*k_proj'", "it matches no layer", "layers.{0..2}.q_proj, lm_head"]]),
        (["layers.0", "*"], [], [["include has 'layers.0'", "it matches no layer"]]),
        (["*q_proj", "lm_head"], ["*head"], [["'lm_head'", "left out by exclude"]]),
        (["*"], ["decoder*"], [["exclude has 'decoder*'", "leaves nothing out", "lm_head"]]),
        (["*"], ["layers.1"], [["'layers.1'", "For all within 'layers.1' write 'layers.1.*'"]]),
    ],
)
def test_patterns_that_do_nothing_are_told(include, exclude, words):
    net = blocks()
    names = convert(net, include=include, exclude=exclude)
    found = list(unused_patterns(net, names, include, exclude))
    assert len(found) == len(words)
    for text, expected in zip(found, words, strict=True):
        assert all(word in text for word in expected)


def test_a_second_name_of_a_layer_counts():
    shared = nn.Linear(2, 2)
    net = nn.ModuleDict({"one": shared, "other": shared})
    assert not list(unused_patterns(net, convert(net, include=["other"]), ["other"], []))


def test_the_first_line_of_a_fit_has_the_names(monkeypatch):
    lines = []
    monkeypatch.setattr(simulated, "rank_zero_info", lines.append)
    fit([SimulatedPrecision()], max_steps=1)
    assert "1 layers converted" in lines[0]
    assert "Converted: body.0. Left out: head." in lines[0]


def test_a_users_own_patterns_are_warned_about_and_nobody_elses():
    with pytest.warns(UserWarning, match=r"SimulatedPrecision: include has 'decoder\*'.* body.0, head"):
        fit([SimulatedPrecision(include=["body*", "decoder*"])], max_steps=1)
    with pytest.warns(UserWarning, match="SimulatedPrecision: exclude has 'tail'"):
        fit([SimulatedPrecision(**{**INT8, "exclude": ["tail"]})], max_steps=1)

    class Projected(Net):
        def __init__(self):
            super().__init__()
            self.q_proj = nn.Linear(6, 6)

        def forward(self, x):
            return super().forward(self.q_proj(x))

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(include|exclude) has")
        fit([SimulatedPrecision(**{**INT8, "exclude": ("*head*", "*norm*")})], max_steps=1)
        fit([SimulatedPrecision(preset="stable_spam_int4")], module=Projected(), max_steps=1)
