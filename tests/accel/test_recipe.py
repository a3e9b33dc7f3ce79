"""Recipes: files, settings and what they refuse."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kinora.accel import recipe as recipes
from kinora.accel.attach import accelerate
from kinora.accel.errors import RecipeError
from kinora.accel.method import AttentionMethod
from kinora.accel.methods import METHODS, TopBlocks
from kinora.accel.options import options_of
from kinora.accel.parts import ATTENTION, STEPS
from kinora.accel.policies import POLICIES, CachePolicy
from kinora.accel.steps import StepPolicy
from kinora.accel.wrappers import Quantised, Reuse, Within


def attention(**table: object) -> recipes.Recipe:
    return recipes.from_table({"attention": {"method": "top-blocks", **table}})


@pytest.mark.parametrize("name", recipes.names())
def test_every_preset_reads_says_what_it_is_for_and_is_written_as_it_was_read(name: str):
    recipe = recipes.find(name)
    assert recipe.name == name and recipe.title
    assert recipes.from_table(recipe.table(), name) == recipe


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_printed_as_a_file_is_read_again(name: str, tmp_path: Path):
    path = tmp_path / "again.toml"
    path.write_text(recipes.find(name).to_toml())
    assert recipes.find(str(path)).table() == recipes.find(name).table()


def test_names_of_presets_need_no_torch():
    code = "import sys; from kinora.accel.presets import DENSE, names; "
    code += "assert DENSE in names() and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_dense_accelerates_nothing():
    assert recipes.find("dense").empty and not recipes.find("balanced").empty


def test_options_of_wrappers_stand_beside_those_of_the_method():
    recipe = attention(keep=0.3, from_step=0.2, every=4)
    inner = TopBlocks(keep=0.3)
    assert recipe.attention == Within(method=Reuse(method=inner, every=4), from_step=0.2)
    assert recipes.from_table(recipe.table()) == recipe


@pytest.mark.parametrize(
    ("method", "told"),
    [
        (Reuse(method=Within(method=TopBlocks(), from_step=0.2), every=4), "reuse, then within"),
        (
            Within(method=Within(method=TopBlocks(), to_step=0.5), from_layer=1),
            "within, then within",
        ),
        (Reuse(method=Reuse(method=TopBlocks(), every=2), every=3), "reuse, then reuse"),
    ],
)
def test_wrappers_that_a_file_could_not_say_are_refused(method: AttentionMethod, told: str):
    recipe = recipes.Recipe(attention=method)
    with pytest.raises(RecipeError, match=told) as caught:
        recipe.table()
    assert "within, then reuse, then quantised, then by-layer once" in str(caught.value)
    with pytest.raises(RecipeError, match=told), accelerate(object(), recipe):
        pytest.fail("before it runs")


@pytest.mark.parametrize(
    "method",
    [
        TopBlocks(keep=0.3),
        Reuse(method=TopBlocks(), every=4),
        Within(method=TopBlocks(), from_layer=2),
        Within(method=Reuse(method=TopBlocks(keep=0.3), every=4), to_step=0.5),
        Reuse(method=Quantised(method=TopBlocks(), qk="int8", pv="fp8"), every=4),
    ],
)
def test_what_is_built_in_code_survives_its_table(method: AttentionMethod):
    recipe = recipes.Recipe(attention=method)
    assert recipes.from_table(recipe.table()) == recipe


def test_a_dense_beginning_is_the_default_and_zero_is_none_at_all():
    assert attention().attention == attention(from_step=0.2).attention == Within(method=TopBlocks())
    bare = attention(from_step=0, every=1, qk="input")
    assert bare.attention == TopBlocks()
    assert bare.table()["attention"]["from_step"] == 0


@pytest.mark.parametrize("method", [TopBlocks(), Within(method=TopBlocks())])
def test_a_table_says_whether_the_beginning_is_dense_whatever_the_default(method: AttentionMethod):
    table = recipes.Recipe(attention=method).table()["attention"]
    assert table["from_step"] == (0.2 if isinstance(method, Within) else 0)
    assert "to_step" not in table and "every" not in table


@pytest.mark.parametrize(
    ("window", "told"),
    [
        ({}, "), after 20% of the steps"),
        ({"to_step": 0.5}, "), after 20% of the steps, until 50% of them"),
        ({"from_step": 0, "to_step": 0.5}, "), until 50% of the steps"),
        ({"from_step": 0, "from_layer": 2}, "), from layer 2 on"),
    ],
)
def test_a_window_is_told_in_words_that_stand_alone(window: dict[str, object], told: str):
    assert attention(**window).attention_words().endswith(told)


def test_settings_are_put_over_a_recipe():
    recipe = recipes.changed(
        recipes.find("balanced"), ["attention.keep=0.3", "attention.every = 5", "when=always"]
    )
    assert recipe.table()["attention"] == {
        **recipes.find("balanced").table()["attention"],
        "keep": 0.3,
        "every": 5,
    }
    assert recipe.when == "always"
    made = recipes.changed(recipes.find("dense"), ["attention.method=top-blocks"])
    assert made.attention == Within(method=TopBlocks(), from_step=0.2)


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("attention.keep=1.5", "attention.keep must be a number above 0 to 1, not 1.5"),
        ("attention.keep=0", "a number above 0 to 1, not 0"),
        ("attention.keep=nan", "a number above 0 to 1, not nan"),
        ("attention.keep=", "a number above 0 to 1, not ''"),
        ("attention.every=2.5", "attention.every must be a whole number from 0 to 1000"),
        ("attention.every=inf", "a whole number from 0"),
        ("attention.from_step=-1", "a number from 0 to 1 (of the steps), not -1"),
        ("attention.qk=fp8", "attention.qk must be one of input, int8, int4, not fp8"),
        ("attention.pv=int9", "one of input, int8, int4, fp8, not int9 (did you mean int8?)"),
        ("attention.kep=1", "blade has no option 'kep' (did you mean keep?)"),
        (
            "attention.order=mortn",
            "must be one of raster, morton, gilbert, not mortn (did you mean morto",
        ),
        (
            "attention.method=topblocks",
            "no attention method 'topblocks' (did you mean top-blocks?)",
        ),
        ("atention.keep=1", "no part 'atention' (did you mean attention?)"),
        ("wen=always", "no 'wen' (did you mean when?)"),
        ("attention.when=always", "of the whole recipe: write --set when=VALUE"),
        ("when=sometimes", "when must be one of faster, always, not sometimes"),
        ("attention.to_step=0.1", "from_step 0.2 must be below attention.to_step 0.1"),
        (
            "attention.keep_least=0.3",
            "attention.keep_least 0.3 must not be above attention.keep 0.25: lower",
        ),
        ("attention.keep=0.04", "attention.keep_least 0.05 must not be above attention.keep 0.04"),
        (
            "attention.by_layer=keep 0.5 0.01",
            "attention.keep_least 0.05 must not be above attention.keep 0.01",
        ),
        ("attention.keep=" + "9" * 400, "a number above 0 to 1, not 999"),
        ("attention.keep", "sets nothing: write PART.OPTION=VALUE"),
        ("=3", "sets nothing"),
        ("kep=0.3", "no 'kep' (did you mean attention.keep?)"),
        ("keep=0.3", "no 'keep' (did you mean attention.keep?)"),
    ],
)
def test_a_bad_setting_is_told_in_one_line(setting: str, told: str):
    with pytest.raises(RecipeError) as caught:
        recipes.changed(recipes.find("balanced"), [setting])
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_settings_are_judged_together():
    balanced = recipes.find("balanced")
    few = recipes.changed(balanced, ["attention.keep=0.02", "attention.keep_least=0"])
    assert few.table()["attention"]["keep"] == 0.02
    settings = ["attention.to_step=0.1", "attention.from_step=0.05"]
    for order in (settings, settings[::-1]):
        within = recipes.changed(balanced, order).attention
        assert isinstance(within, Within) and (within.from_step, within.to_step) == (0.05, 0.1)
    twice = recipes.changed(balanced, ["attention.keep=7", "attention.keep=0.3"])
    assert twice.table()["attention"]["keep"] == 0.3


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["attention.to_step=0.1", "attention.every=2"], "must be below attention.to_step 0.1"),
        (["attention.to_step=0.1", "attention.from_step=0.15"], "from_step 0.2 must be below"),
        (["attention.keep=7", "attention.every=-1"], "attention.keep must be"),
        (["attention.every=-1", "attention.keep=7"], "attention.every must be"),
    ],
)
def test_settings_that_stay_wrong_are_told_by_the_first(settings: list[str], told: str):
    with pytest.raises(RecipeError) as caught:
        recipes.changed(recipes.find("balanced"), settings)
    assert told in str(caught.value)


def test_a_setting_of_a_part_that_is_not_there_says_what_to_do():
    with pytest.raises(RecipeError, match=r"set attention[.]method first"):
        recipes.changed(recipes.find("dense"), ["attention.keep=0.3"])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[attention]\nkeep = 0.3", "attention names no method; there are "),
        ("attention = 3", "attention is 3; it must be a table"),
        ("[attention]\nmethod = 'top-blocks'\nkeep = true", "not True"),
        ("[attention]\nmethod = 'top-blocks'\nkeep = [1]", "not [1]"),
        ("[caches]\nx = 1", "a recipe has no 'caches'"),
        ("not toml", "is no TOML file"),
        ("[attention]\nmethod = ['top-blocks']", "no attention method"),
        ("[attention]\nmethod = 'top-blocks'\nkeep = " + "9" * 400, "not 999"),
        ("a = " + "9" * 5000, "is no TOML file"),
        ("a = " + "[" * 5000, "is no TOML file"),
        ("title = 3", "title must be text, not 3"),
    ],
)
def test_a_bad_file_is_named_and_told(tmp_path: Path, text: str, told: str):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        recipes.find(str(path))
    assert told in str(caught.value) and str(path) in str(caught.value)


def test_a_recipe_that_is_not_there_is_told_with_the_nearest(tmp_path: Path):
    with pytest.raises(RecipeError, match="did you mean balanced"):
        recipes.find("balancd")
    with pytest.raises(RecipeError, match="cannot be read: No such file"):
        recipes.find(str(tmp_path / "none.toml"))


@pytest.mark.parametrize("name", ["~nobody-here/x.toml", "x" * 5000, "a\0b.toml"])
def test_a_path_that_is_none_is_told(name: str):
    with pytest.raises(RecipeError) as caught:
        recipes.find(name)
    assert len(str(caught.value)) < 300


def test_a_file_of_ones_own_is_read(tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_text('title = "mine"\n[attention]\nmethod = "top-blocks"\nkeep = 0.5\n')
    assert recipes.find(str(path)).attention == Within(method=TopBlocks(keep=0.5))


def test_a_title_goes_with_what_it_describes():
    fast = recipes.find("fast")
    assert "title" not in recipes.changed(fast, ["attention.keep=0.4"]).table()
    there_and_back = ["attention.keep=0.4", f"attention.keep={fast.table()['attention']['keep']}"]
    for settings in ((), there_and_back):
        assert recipes.changed(fast, settings).table() == fast.table()
    its_own = ["attention.keep=0.4", f"title={fast.title}"]
    assert recipes.changed(fast, its_own).title == fast.title, "who says so means it"
    own = recipes.changed(fast, ["attention.keep=0.4", "title=Mine"])
    assert own.title == "Mine" and recipes.changed(fast, ["title=Mine"]).title == "Mine"


def test_texts_are_short_and_utf8_and_come_back_from_a_file(tmp_path: Path):
    for text, told in (("\ud800", "title is no UTF-8 text"), ("a" * 20_001, "20,000 are the most")):
        with pytest.raises(RecipeError, match=told):
            recipes.from_table({"title": text})
    path = tmp_path / "mine.toml"
    title = 'a "b" \\ \x7f \x01 é \n'
    path.write_text(recipes.from_table({"title": title}).to_toml())
    assert recipes.find(str(path)).title == title


def test_files_that_a_recipe_names_are_known():
    paro = {"method": "paro", "calibration": "a.npz", "from_step": 0.5}
    found = recipes.from_table({"attention": paro, "steps": {"policy": "pattern", "mask": "b"}})
    assert found.paths() == {"attention.calibration": "a.npz", "steps.mask": "b"}
    for table in ({}, {"attention": {"method": "paro"}}, {"parallel": {"cfg": 2}}):
        assert recipes.from_table(table).paths() == {}


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_text(recipes.find("balanced").to_toml(), encoding="utf-8-sig")
    assert path.read_bytes().startswith(b"\xef\xbb\xbf")
    assert recipes.find(str(path)).table() == recipes.find("balanced").table()


SKIPPING = [it for it in POLICIES.values() if not issubclass(it, CachePolicy)]


@pytest.mark.parametrize("policy", [it.name for it in SKIPPING])
def test_a_policy_is_printed_read_and_changed_as_a_method_is(policy: str, tmp_path: Path):
    recipe = recipes.changed(
        recipes.find("balanced"), [f"steps.policy={policy}", "steps.from_step=0.3"]
    )
    assert recipe.steps is not None and recipe.steps.name == policy and not recipe.empty
    assert recipe.table()["steps"]["from_step"] == 0.3
    assert recipes.from_table(recipe.table(), recipe.name) == recipe
    path = tmp_path / "again.toml"
    path.write_text(recipe.to_toml())
    assert recipes.find(str(path)).table() == recipe.table()
    assert f"steps by {policy} (" in recipe.words() and "attention by blade" in recipe.words()
    again = recipes.changed(recipe, ["steps.policy=pattern"])
    assert again.steps == POLICIES["pattern"]() and again.attention == recipe.attention


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[steps]\nthreshold = 1", "steps names no policy; there are pattern, shadow"),
        ("steps = 3", "steps is 3; it must be a table with a policy in it"),
        ("[steps]\npolicy = 'shadow'\nmax_skip = 99", "steps.max_skip must be a whole number"),
        ("[steps]\npolicy = 'shadow'\nkappa = 1", "shadow has no option 'kappa'"),
    ],
)
def test_a_bad_policy_is_told(tmp_path: Path, text: str, told: str):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        recipes.find(str(path))
    assert told in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("policy", POLICIES.values())
def test_every_option_of_a_policy_has_help_and_a_range_or_choices(policy: type[StepPolicy]):
    for it in STEPS.options(policy):
        assert it.help and it.help[0].isupper() and not it.help.endswith(".")
        free = it.choices or it.kind in (bool, str)
        assert free or (it.least is not None and it.most is not None)
    window = {"from_step", "to_step"}
    assert (policy in SKIPPING) == (window <= {it.name for it in STEPS.options(policy)})


@pytest.mark.parametrize("policy", [it for it in POLICIES if POLICIES[it] not in SKIPPING])
def test_a_cache_is_printed_and_read_as_a_policy_is(policy: str, tmp_path: Path):
    recipe = recipes.changed(recipes.find("dense"), [f"steps.policy={policy}"])
    assert recipe.steps == POLICIES[policy]() and not recipe.empty
    path = tmp_path / "again.toml"
    path.write_text(recipe.to_toml())
    assert recipes.find(str(path)).table() == recipe.table()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[steps]\npolicy = ['sada', 'taylorseer']", "steps.policy names sada, taylorseer: a reci"),
        ("[steps]\npolicy = 'shadow+mag-cache'", "at most one step policy, keep one of them"),
        ("[[steps]]\npolicy = 'sada'\n[[steps]]\npolicy = 'easy'", "steps is given 2 times: a re"),
        ("[steps]\npolicy = 'taylorseer'\nuse_lite_mode = true\ncache_identifiers = 'a'", "leave"),
        ("[steps]\npolicy = 'taylorseer'\ncache_identifiers = '('", "must be a regular expression"),
        (
            "[steps]\npolicy = 'mag-cache'\nmag_ratios = '1 a'",
            "must be numbers above 0, one for ea",
        ),
        ("[steps]\npolicy = 'mag-cache'\nmag_ratios = '1'\ncalibrate = true", "leave steps.mag_ra"),
        (
            "[steps]\npolicy = 'faster-cache'\nbelow_timestep = -1",
            "-1 must be less than steps.below_",
        ),
        (
            "[steps]\npolicy = 'pyramid-attention-broadcast'\nspatial_skip_range = 0",
            "are all 0, which reuses nothing",
        ),
    ],
)
def test_what_no_cache_can_do_is_told(tmp_path: Path, text: str, told: str):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        recipes.find(str(path))
    assert told in str(caught.value)


@pytest.mark.parametrize("method", METHODS.values())
def test_every_option_has_help_and_a_range_or_choices(method: type[TopBlocks]):
    for it in ATTENTION.options(method):
        assert it.help and it.help[0].isupper() and not it.help.endswith(".")
        free = it.choices or it.kind in (bool, str)
        assert free or (it.least is not None and it.most is not None)
    names = [it.name for it in ATTENTION.options(method)]
    assert len(set(names)) == len(names)
    assert (method.__doc__ or "").strip() and options_of(method)
