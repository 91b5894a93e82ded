"""What a quantizer takes and what it refuses, with the words that say what to do."""

import math
import pickle
from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from lightning_stable.functional.quantize import Quantizer, parse_format, quantize, value_table


@pytest.mark.parametrize(
    "name",
    [
        "",
        "fp8",
        "E4M3",
        "e0m3",
        "e9m2",
        "e4m11",
        "e4m",
        "e4m03",
        "int1",
        "int9",
        "int16",
        "shift1",
        "shift9",
        "mxfp5",
        "float32",
        None,
        8,
    ],
)
def test_an_unknown_format_is_refused_with_those_there_are(name):
    with pytest.raises(ValueError, match=r"is unknown.*'eXmY'.*'int2' to 'int8'.*'nvfp4'.*'ternary'"):
        parse_format(name)
    with pytest.raises(ValueError, match=r"Quantizer: format="):
        Quantizer(name)
    with pytest.raises(ValueError, match=r"is unknown"):
        value_table(name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("e4m3", "group"), "scaling='group' is unknown.*'group:128'"),
        (("e4m3", "group:0"), "scaling='group:0' is unknown"),
        (("e4m3", "group:-8"), "scaling='group:-8' is unknown"),
        (("e4m3", "group:1.5"), "scaling='group:1.5' is unknown"),
        (("e4m3", "shift:"), "scaling='shift:' is unknown"),
        (("e4m3", "row:4"), "scaling='row:4' is unknown"),
        (("e4m3", "rows"), "scaling='rows' is unknown"),
        (("e4m3", None), "scaling=None is unknown"),
        (("mxfp8", "row"), "scaling='row' has no meaning with format='mxfp8'.*brings its own"),
        (("nvfp4", "group:16"), "scaling='group:16' has no meaning with format='nvfp4'"),
        (("binary", "shift:4"), "scaling='shift:4' has no meaning with format='binary'"),
        (("e4m3", "none", "up"), "rounding='up' is unknown.*'nearest', 'stochastic', 'truncate'"),
        (("binary", "row", "stochastic"), "rounding='stochastic' has no meaning with format='binary'"),
        (("ternary", "row", "truncate"), "rounding='truncate' has no meaning with format='ternary'"),
    ],
)
def test_settings_without_meaning_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"^Quantizer: {message}"):
        Quantizer(*settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_outliers": -1}, "keep_outliers=-1 is not a whole number"),
        ({"keep_outliers": 0.5}, "keep_outliers=0.5 is not a whole number"),
        ({"keep_outliers": True}, "keep_outliers=True is not a whole number"),
        ({"keep_outliers": 2, "scaling": "shift:4"}, "keep_outliers=2 has no meaning.*scaling='shift'"),
        ({"asymmetric": True, "scaling": "row"}, "asymmetric=True has no meaning with format='e4m3'.*'int2' to 'int8'"),
        ({"asymmetric": True, "format": "int4"}, "asymmetric=True has no meaning.*scaling='none'"),
        (
            {"asymmetric": True, "format": "int4", "scaling": "shift:2"},
            "asymmetric=True has no meaning.*scaling='shift:2'",
        ),
        ({"asymmetric": 1}, "asymmetric=1 is neither True nor False"),
        ({"passes_saturated": "no"}, "passes_saturated='no' is neither True nor False"),
        ({"padding": None}, "padding=None is neither True nor False"),
        ({"estimator": "ste"}, "estimator='ste' is unknown.*'identity', 'reste'"),
        ({"estimator": "reste"}, "estimator='reste' has no meaning with format='e4m3'.*'binary'"),
        (
            {"estimator": "reste", "format": "binary", "keep_outliers": 1},
            "estimator='reste' has no meaning.*keep_outliers=1",
        ),
        ({"exponent_bias": 3.0, "scaling": "row"}, "exponent_bias=3.0 has no meaning.*scaling='none'"),
        ({"exponent_bias": 3.0, "format": "int4"}, "exponent_bias=3.0 has no meaning"),
        ({"exponent_bias": 3.0, "format": "mxfp4"}, "exponent_bias=3.0 has no meaning"),
        ({"exponent_bias": math.nan}, "exponent_bias=nan is not a number from -119 to 133"),
        ({"exponent_bias": math.inf}, "exponent_bias=inf is not a number"),
        ({"exponent_bias": 134}, "exponent_bias=134 is not a number from -119 to 133.*bias of 'e4m3' is 7"),
        ({"exponent_bias": True}, "exponent_bias=True is not a number"),
        ({"exponent_bias": "7"}, "exponent_bias='7' is not a number"),
    ],
)
def test_settings_by_name_without_meaning_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"^Quantizer: {message}"):
        Quantizer(**{"format": "e4m3", **settings})


def test_a_quantizer_is_frozen_compares_by_its_settings_and_can_be_copied():
    quantizer = Quantizer("int4", "group:128")
    with pytest.raises(FrozenInstanceError):
        quantizer.format = "int8"
    assert quantizer == Quantizer("int4", "group:128")
    assert len({quantizer, Quantizer("int4", "group:128"), Quantizer("int4", "group:64")}) == 2
    assert (quantizer.spec, quantizer.layout, quantizer.size) == (parse_format("int4"), "group", 128)
    eight = replace(quantizer, format="int8")
    assert eight.spec.largest == 127
    blocks = Quantizer("nvfp4")
    assert (blocks.layout, blocks.size) == ("group", 16)
    copied = pickle.loads(pickle.dumps(blocks))
    assert copied == blocks
    assert copied.spec == blocks.spec


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_what_is_not_floating_point_is_refused(dtype):
    with pytest.raises(ValueError, match=rf"{dtype} cannot be quantized"):
        quantize(torch.ones(3, dtype=dtype), Quantizer("e4m3"))
