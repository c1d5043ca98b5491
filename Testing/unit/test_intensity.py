"""Windows and normalisations against their formulas, and what a person is warned of."""

import numpy as np
import pytest
from UNetSegmentationLib.image import UserError, read_image
from UNetSegmentationLib.intensity import (
    AIR_HU,
    check_finite,
    display_range,
    expects_hu,
    has_hu,
    is_air,
    normaliser,
    parse_window,
    presets,
    warnings_for,
)

LUNG = {"mode": "window", "level": -600, "width": 1500}
FOREGROUND = {"mode": "ct-foreground", "low": -200.5, "high": 300.25, "mean": 40.5, "std": 75.25}


def channels(dtype: str = "int16", n: int = 2) -> np.ndarray:
    rng = np.random.default_rng(0)
    low = 0 if dtype[0] == "u" else -1024
    return np.stack([rng.integers(low, 200 + 1000 * k, (6, 20, 22)) for k in range(1, n + 1)]).astype(dtype)


def normalised(intensity, values):
    out = normaliser(intensity, values)(values)
    assert out.dtype == np.float32 and out.shape == values.shape
    return out


# -------------------------------------------------------------------------------------------------------- normalisation


@pytest.mark.parametrize("dtype", ["int16", "uint16", "int32", "uint8", "int64", "float32", "float64"])
def test_none_leaves_the_values(dtype):
    values = channels(dtype) if dtype != "uint8" else channels("uint16").astype(np.uint8)
    assert np.array_equal(normalised({"mode": "none"}, values), values.astype(np.float32))


@pytest.mark.parametrize("dtype", ["int16", "int32", "float32"])
def test_window_maps_its_ends_to_0_and_1(dtype):
    values = channels(dtype)
    want = np.clip((values.astype(np.float64) - (-1350)) / 1500, 0, 1)
    np.testing.assert_allclose(normalised(LUNG, values), want, atol=1e-6)
    ends = np.array([-3000, -1350, -600, 150, 4000], dtype).reshape(1, 1, 1, -1)
    np.testing.assert_allclose(normalised(LUNG, ends).ravel(), [0, 0, 0.5, 1, 1], atol=1e-6)


def test_ct_foreground_clips_and_standardises():
    values = channels()
    want = (np.clip(values.astype(np.float64), -200.5, 300.25) - 40.5) / 75.25
    np.testing.assert_allclose(normalised(FOREGROUND, values), want, atol=1e-5)


def test_zscore_is_of_each_channel_alone():
    values = channels()
    for got, channel in zip(normalised({"mode": "zscore"}, values), values.astype(np.float64), strict=True):
        np.testing.assert_allclose(got, (channel - channel.mean()) / channel.std(), atol=1e-5)


def test_zscore_of_the_nonzero_voxels():
    values = channels("float32")
    values[:, :, :10] = 0
    for got, channel in zip(normalised({"mode": "zscore", "nonzero": True}, values), values.astype(np.float64), strict=True):
        inside = channel[channel != 0]
        np.testing.assert_allclose(got, (channel - inside.mean()) / inside.std(), atol=1e-5)
    assert not normalised({"mode": "zscore", "nonzero": True}, np.zeros((1, 4, 4, 4), np.float32)).any()


def test_a_robust_zscore_does_not_see_a_few_voxels_far_outside():
    values = np.random.default_rng(0).normal(100, 20, (1, 20, 20, 20)).astype(np.float32)
    hot = values.copy()
    hot[0, 3, 3, 3:6], hot[0, 9, 9, 9] = 1e5, -1e5
    robust = {"mode": "zscore", "robust": True}
    np.testing.assert_allclose(normalised(robust, values), normalised({"mode": "zscore"}, values), atol=1e-5)
    got, want = normalised(robust, hot), normalised(robust, values)
    same = hot == values
    np.testing.assert_allclose(got[same], want[same], atol=0.06)
    assert np.abs(got).max() < 10 and np.abs(normalised({"mode": "zscore"}, hot) - want)[same].max() > 1
    spot = np.zeros((1, 20, 20, 20), np.float32)
    spot[0, 1, 1, :9] = 1  # its middle 98 % have no width
    assert np.array_equal(normalised(robust, spot), normalised({"mode": "zscore"}, spot))


def test_percentile_maps_its_ends_to_0_and_1():
    values = channels("float32")
    for got, channel in zip(normalised({"mode": "percentile", "low": 1, "high": 99}, values), values, strict=True):
        low, high = np.percentile(channel, [1, 99])
        np.testing.assert_allclose(got, np.clip((channel.astype(np.float64) - low) / (high - low), 0, 1), atol=1e-5)
    two, half = np.arange(64).reshape(1, 4, 4, 4) % 2 == 1, {"mode": "percentile", "low": 0, "high": 50}
    for values in (two, two * np.int8(-100) + ~two * np.int8(100)):  # of which NumPy's own percentiles are none, and 128
        assert np.array_equal(normalised(half, values) > 0.5, values == values.max())
        assert display_range(half, values)[1] < 1


@pytest.mark.parametrize(
    "intensity", [{"mode": "zscore"}, {"mode": "percentile", "low": 1, "high": 99}, {"mode": "zscore", "nonzero": True}]
)
@pytest.mark.parametrize("value", [0, 7, -1024, 3.7e6])
def test_a_constant_channel_becomes_0(intensity, value):
    values = np.full((1, 5, 6, 7), value, np.float32)
    np.testing.assert_allclose(normalised(intensity, values), 0, atol=1e-3)


def test_values_of_any_scale_are_standardised():
    base = channels("float32", 1)
    want = normalised({"mode": "zscore"}, base)
    for factor in (1e-4, 1.0, 1700.0):
        np.testing.assert_allclose(normalised({"mode": "zscore"}, base * np.float32(factor)), want, atol=1e-4)


def test_statistics_of_a_large_image_come_from_a_thinned_copy_and_stay_close():
    values = np.random.default_rng(1).normal(100, 20, (1, 80, 200, 200)).astype(np.float32)
    out = normalised({"mode": "zscore"}, values)
    assert abs(out.mean()) < 5e-3 and abs(out.std() - 1) < 5e-3


def test_a_normaliser_treats_a_part_as_the_whole():
    values = channels()
    for intensity in (LUNG, FOREGROUND, {"mode": "zscore"}, {"mode": "percentile", "low": 2, "high": 98}):
        n = normaliser(intensity, values)
        assert np.array_equal(n(values[:, 1:3, 4:9]), n(values)[:, 1:3, 4:9])


def test_the_input_is_left_alone():
    values = channels("float32")
    before = values.copy()
    for intensity in ({"mode": "none"}, LUNG, {"mode": "zscore"}, {"mode": "percentile", "low": 1, "high": 99}):
        normalised(intensity, values)
    assert np.array_equal(values, before)


def test_an_unknown_mode_is_one_sentence():
    with pytest.raises(UserError, match="unknown intensity mode 'histogram'"):
        normaliser({"mode": "histogram"}, channels())


# -------------------------------------------------------------------------------------------------------------- windows


def test_presets_are_the_clinical_ones():
    ct = {name: (p.level, p.width) for name, p in presets().items() if p.modality == "CT"}
    assert ct["lung"] == (-600, 1500) and ct["mediastinum"] == (40, 400) and ct["brain"] == (40, 80) and ct["ct-lung-field"] == (-300, 1400)
    for name, (level, width) in ct.items():
        assert -1000 <= level <= 600 and 40 <= width <= 4000 and level - width / 2 >= -1350, name


def test_every_preset_can_be_parsed_used_and_shown():
    values = channels()
    for name, preset in presets().items():
        assert preset.name == name and preset.label and preset.modality in ("CT", "MR")
        intensity = parse_window(name)
        assert intensity == preset.intensity()
        out = normalised(intensity, values)
        assert out.min() >= 0 and out.max() <= 1
        low, high = display_range(intensity, values)
        assert low < high


def test_level_and_width_are_parsed():
    assert parse_window("-600,1500") == {"mode": "window", "level": -600, "width": 1500}
    assert parse_window(" 40.5 , 0.5") == {"mode": "window", "level": 40.5, "width": 0.5}


@pytest.mark.parametrize(
    "text", ["", "lungs", "40", "40,", "40,400,3", "a,b", "40,0", "40,-3", "nan,400", "40,nan", "40,inf", "-inf,400", "1e308,1", "0,1e39"]
)
def test_other_windows_are_refused(text):
    with pytest.raises(UserError) as error:
        parse_window(text)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_display_range():
    assert display_range(LUNG, channels()) == (-1350, 150)
    values = channels("float32")
    assert display_range({"mode": "zscore"}, values) == pytest.approx(tuple(np.percentile(values[0], [0.5, 99.5])))
    low, high = display_range({"mode": "none"}, np.full((1, 4, 4, 4), 3.0))
    assert low < high


# ------------------------------------------------------------------------------------------------------------------ air


def test_air_is_what_holds_no_tissue():
    air = np.full((1, 4, 4, 4), -1000, np.int16)
    for intensity in (LUNG, FOREGROUND):
        assert is_air(air, intensity)
        touched = air.copy()
        touched[0, 1, 2, 3] = AIR_HU
        assert not is_air(touched, intensity)
    for mode in ("zscore", "percentile"):
        assert is_air(np.zeros((2, 4, 4, 4)), {"mode": mode}) and not is_air(np.eye(4)[None, None], {"mode": mode})
        assert not is_air(air, {"mode": mode})
    assert not is_air(np.zeros((1, 4, 4, 4)), {"mode": "none"})


# ------------------------------------------------------------------------------------------------------------- warnings


@pytest.mark.parametrize("intensity", [LUNG, FOREGROUND])
@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 255), (0, 4095), (-1, 1), (-100, 150)])
def test_values_that_are_not_hu_are_warned_of(intensity, low, high):
    values = np.linspace(low, high, 64, dtype=np.float32).reshape(1, 4, 4, 4)
    (text,) = warnings_for(intensity, values)
    assert "values do not look like HU" in text and f"from {low} to {high}" in text


def test_what_lies_outside_the_field_of_view_makes_no_hu():
    values = np.linspace(0, 4095, 64, dtype=np.float32).reshape(1, 4, 4, 4)
    values[0, :, 0] = -2000
    assert "from 260 to 4095" in warnings_for(LUNG, values)[0] and not has_hu(values)
    assert warnings_for(LUNG, values - 1024) == [] and has_hu(values - 1024)


def test_a_ct_that_was_shifted_or_scaled_is_warned_of():
    """Its lung lies where padding does, which is one value or two."""
    rng = np.random.default_rng(0)
    hu = np.concatenate([rng.normal(-850, 60, 3000), rng.normal(40, 30, 3000), np.full(2000, -3024), np.full(900, -2000)])
    hu = hu.round().astype(np.int32).reshape(1, 1, 89, 100)
    assert warnings_for(LUNG, hu) == []
    for wrong in (hu - 1024, hu * 10):
        assert "do not look like HU" in warnings_for(LUNG, wrong)[0]


def test_models_that_do_not_expect_hu_never_warn():
    for mode in ("none", "zscore", "percentile"):
        assert not expects_hu({"mode": mode}) and warnings_for({"mode": mode}, np.zeros((1, 4, 4, 4))) == []


@pytest.mark.parametrize(
    "file",
    [
        "chest_ct/LIDC-IDRI-0001_ct.nii.gz",
        "chest_ct/LUNG1-001_ct.nii.gz",
        "odd_files/CTChest4.nrrd",
        "chest_ct_dicom_LungDx-A0002",
        "ct_dicom_jpeg2000",
        "lung_gtv_dicom_rtstruct/pat_3",
    ],
)
def test_real_ct_is_not_warned_of(data, file):
    assert warnings_for(LUNG, read_image(data / file).channels) == []


def test_nodule_crops_are_not_warned_of(data):
    crops = sorted((data / "lidc_nodules" / "images").glob("*.nii.gz"))[::40]
    assert len(crops) > 10
    assert [c.name for c in crops if warnings_for(LUNG, read_image(c).channels)] == []


def test_mr_is_warned_of(data):
    assert warnings_for(LUNG, read_image(data / "msd_hippocampus" / "images" / "hippocampus_003.nii.gz").channels)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers_are_refused(bad):
    values = channels("float32")
    check_finite(values, "scan.nrrd")
    values[1, 2, 3, :2] = bad
    with pytest.raises(UserError, match="scan.nrrd has 2 voxels that are NaN or infinite"):
        check_finite(values, "scan.nrrd")
    check_finite(channels("int16"), "scan.nrrd")


def test_what_has_no_anatomy_is_warned_of_and_looked_at_nevertheless():
    assert len(warnings_for({"mode": "window", "level": 40, "width": 400}, np.full((1, 4, 4, 4), -2000, np.int16))) == 1
    assert display_range(FOREGROUND, np.arange(1000.0).reshape(1, 10, 10, 10)) == pytest.approx((5, 994), abs=1)


def test_of_few_planes_all_are_looked_at():
    values = np.zeros((1, 2, 1000, 1000), np.int16)
    values[0, 1] = -900
    assert has_hu(values) and normaliser({"mode": "percentile", "low": 0, "high": 100}, values).low == -900


def test_without_nonzero_zeros_count():
    values = np.zeros((1, 4, 4, 4), np.float32)
    values[:, :2] = 10
    n = normaliser({"mode": "zscore"}, values)
    assert (n.shift, n.scale) == (5, 5)
