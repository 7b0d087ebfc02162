"""Answers drawn at random under every kind of constraint: they fit, they end, and how they are cut never matters."""

import json
import random
import re

import pytest
import torch

from pyrosome.engine.constrain import MAX_CACHED, Grammars
from pyrosome.errors import EngineError, RequestError
from pyrosome.options import Constraint, SamplingParams
from tests.chat.cases import NANO, OFFICIAL, TOOLS, block, called, prompt_for, read, tokenizer

NUM_SPARE = 192  # a network may have more ids than its tokenizer
HOMES = {"official": (OFFICIAL, 129280), "nano": (NANO, tokenizer(NANO).vocab_size + NUM_SPARE)}
GRAMMARS = {name: Grammars(home / "tokenizer.json", size, 1) for name, (home, size) in HOMES.items()}
EOS, PARAMS = 1, SamplingParams()
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "mood": {"enum": ["<｜User｜>", "😀 é", "</think>"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "age", "mood", "tags"],
    "additionalProperties": False,
}
DECLARED = json.dumps([{"type": "function", "function": t} for t in TOOLS])
KINDS = {
    "json": Constraint("json", json.dumps(PERSON)),
    "regex": Constraint("regex", r"[a-z]{2,6}-\d{3}(x|yy)?"),
    "lark": Constraint("lark", 'start: "sum " N ("+" N)~1..3\nN: /[0-9]{1,3}/'),
    "tool_call_required": Constraint("tool_call_required", DECLARED),
}
both = pytest.mark.parametrize("home", HOMES)


def id_of(home, token):
    return tokenizer(HOMES[home][0]).id_of(token)


def text_of(home, ids):
    return tokenizer(HOMES[home][0]).decode([i for i in ids if i != EOS])


def choose(home, mask, rng):
    """An allowed id at random; as likely a short one, or an answer of 129,280 ids would never close a string."""
    if mask is None:
        return rng.randrange(3, 250)
    allowed = mask.nonzero().flatten().tolist()
    known = GRAMMARS[home].vocabulary().tokens
    short = [i for i in rng.sample(allowed, min(len(allowed), 400)) if len(known[i]) <= 3]
    tags = [i for i in allowed if known[i] == "｜DSML｜".encode()]  # or the slash that closes one, or text
    closing = [i for i in allowed if known[i] in (b'"', b"<", b"</", b"/", b"}")] if rng.random() < 0.5 else []
    slash = [i for i in allowed if known[i] == b"/"]
    return rng.choice((tags and tags + slash) or closing or short or allowed)


def draw(home, guide, seed, *, jump=True, most=3000):
    """Ids drawn from the masks, until the end."""
    rng, ids = random.Random(seed), []
    while len(ids) < most:
        guide.prepare([])
        ids.append(choose(home, guide.mask(0), rng))
        guide.accept(ids[-1])
        if guide._has_ended:
            return [*ids[:-1], EOS]
        for token in guide.forced() if jump else []:
            guide.accept(token)
            ids.append(token)
    raise AssertionError(f"no end in {most} ids: {text_of(home, ids)!r}")


def fits(kind, home, ids):
    assert ids[-1] == EOS and len(ids) > 1
    control = set(tokenizer(HOMES[home][0]).control_tokens.values()) - {id_of(home, "｜DSML｜"), EOS}
    assert not control & set(ids), "a template's token within a value"
    text = text_of(home, ids)
    if kind == "json":
        value = json.loads(text)
        assert list(value) == list(PERSON["properties"]) and len(value["name"]) <= 12 and 0 <= value["age"] <= 150
        assert value["mood"] in PERSON["properties"]["mood"]["enum"] and len(value["tags"]) <= 3
    elif kind == "regex":
        assert re.fullmatch(KINDS["regex"].schema, text)
    elif kind == "lark":
        assert re.fullmatch(r"sum \d{1,3}(\+\d{1,3}){1,3}", text, re.ASCII)
    else:
        message, _, parser = read(ids, prompt_for(tools=TOOLS, start="tools"), directory=HOMES[home][0])
        assert message.tool_calls and not message.content and parser.calls_closed
        for name, values in called(message):
            assert {"get_weather": "city", "read": "path"}[name] in values
            assert values.get("unit", "c") in ("c", "f") and isinstance(values.get("lines", 0), int)


@both
@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_drawn_at_random_fits_and_ends_by_itself(home, kind):
    for seed in range(8):
        fits(kind, home, draw(home, GRAMMARS[home].compile(KINDS[kind], None, PARAMS), seed))


@both
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_forced_is_the_same_ids_whether_jumped_or_drawn(home, kind):
    jumped = 0
    for seed in range(4):
        guide = GRAMMARS[home].compile(KINDS[kind], None, PARAMS)
        ids = draw(home, guide.fork(), seed, jump=False)
        again, at = [], 0
        while at < len(ids):
            if forced := guide.forced():
                assert ids[at : at + len(forced)] == forced
                jumped += len(forced)
            again += forced or [ids[at]]
            for token in forced or [ids[at]]:
                guide.accept(token)
            at = len(again)
        assert again == ids and guide.is_finished
    assert jumped or kind == "regex"


@both
@pytest.mark.parametrize("kind", [*KINDS, "tool_call", "thinking"])
def test_drafts_leave_masks_as_they_are_without(home, kind):
    think_end = id_of(home, "</think>")
    constraint = KINDS.get(kind) or (Constraint("tool_call", DECLARED) if kind == "tool_call" else None)
    limits = SamplingParams(max_thinking_tokens=5)
    start = GRAMMARS[home].compile(constraint, think_end if kind == "thinking" else None, limits)
    tail = tokenizer(HOMES[home][0]).encode("Hi" + block(("read", {"path": "a/b", "lines": 2})), allow_special=True)
    for seed in range(3):
        rng = random.Random(seed)
        ids = [*tail, EOS] if kind == "tool_call" else None
        ids = ids or ([*tail[:5], think_end, *tail[:3], EOS] if kind == "thinking" else draw(home, start.fork(), seed))
        plain, at = start.fork(), 0
        drafted = start.fork()
        while at < len(ids):
            drafts = ids[at : at + rng.randrange(4)]
            if rng.random() < 0.5:
                drafts = [*drafts, rng.randrange(HOMES[home][1])]
            usable = drafted.usable(drafts)
            drafted.prepare(drafts[:usable])
            twin = plain.fork()
            for i in range(usable + 1):
                twin.prepare([])
                mask, same = drafted.mask(i), twin.mask(0)
                assert (mask is None) == (same is None) and (mask is None or torch.equal(mask, same))
                refused = mask is not None and i < len(drafts) and not mask[drafts[i]]
                assert not refused or i == usable, "a draft that is not allowed was taken for usable"
                if i == usable:
                    break
                twin.accept(drafts[i])
                if drafts[i] == EOS:
                    break
            assert usable >= min(len(ids) - at, len(drafts) - (drafts != ids[at : at + len(drafts)]))
            for guide in (plain, drafted):
                guide.accept(ids[at])
            at += 1


def test_forks_made_while_masks_are_computed_go_their_own_ways():
    guide = GRAMMARS["official"].compile(KINDS["json"], None, PARAMS)
    for seed in range(8):
        guide.prepare([])
        twin = guide.fork()
        fits("json", "official", draw("official", twin, seed))
        assert guide.mask(0).any() and not guide.is_finished


@both
def test_a_constraint_begins_after_reasoning_which_a_budget_closes(home):
    think_end = id_of(home, "</think>")
    constraint, stop = Constraint("json", json.dumps(PERSON), after_reasoning=True), id_of(home, "<｜User｜>")
    params = SamplingParams(max_thinking_tokens=3, stop_token_ids=(stop,))
    guide = GRAMMARS[home].compile(constraint, think_end, params)
    for token in (5, 6, 7):
        guide.prepare([])
        assert not guide.mask(0)[EOS] and not guide.mask(0)[stop] and guide.mask(0)[think_end] and not guide.forced()
        guide.accept(token)
    guide.prepare([])
    assert guide.forced() == [think_end] and guide.mask(0).nonzero().flatten().tolist() == [think_end]
    guide.accept(think_end)
    fits("json", home, draw(home, guide, 3))


@both
def test_an_answer_is_not_over_before_it_says_something(home):
    think_end = id_of(home, "</think>")
    guide = GRAMMARS[home].compile(None, think_end, PARAMS)
    blank = tokenizer(HOMES[home][0]).encode("\n\n")
    for token in (5, think_end, *blank, think_end):
        guide.accept(token)
        guide.prepare([])
        assert not guide.mask(0)[EOS]
    guide.accept(tokenizer(HOMES[home][0]).encode("a")[0])
    guide.prepare([EOS])
    assert guide.is_free and guide.mask(0) is None and guide.usable([EOS]) == 1
    assert GRAMMARS[home].compile(None, None, PARAMS).is_free
    assert not GRAMMARS[home].compile(None, None, PARAMS, never_empty=True).is_free
    started = GRAMMARS[home].compile(Constraint("regex", "a*"), None, PARAMS)
    started.prepare([])
    assert not started.mask(0)[EOS]


@both
def test_an_answer_is_not_over_before_it_has_the_tokens_it_must(home):
    params, think_end = SamplingParams(min_tokens=3, stop_token_ids=(7,)), id_of(home, "</think>")
    guide = GRAMMARS[home].compile(None, None, params)
    for _ in range(3):
        guide.prepare([5, EOS])
        assert not guide.mask(0)[[EOS, 7]].any() and guide.mask(0).sum() == GRAMMARS[home].vocab_size - 2
        guide.accept(5)
    assert guide.is_free
    thinking = GRAMMARS[home].compile(None, think_end, params, never_empty=False)
    for token in (5, 5, think_end):
        thinking.accept(token)
    assert thinking.is_free, "thoughts count"
    word = GRAMMARS[home].compile(Constraint("regex", "a*"), None, params)
    for token in tokenizer(HOMES[home][0]).encode("a") * 3:
        word.prepare([])
        assert not word.mask(0)[EOS]
        word.accept(token)
    word.prepare([])
    assert word.mask(0)[EOS]
    short = GRAMMARS[home].compile(Constraint("regex", "a"), None, params)
    short.accept(tokenizer(HOMES[home][0]).encode("a")[0])
    short.prepare([])
    assert short.mask(0)[EOS], "the grammar has nothing more to say"


def test_no_tokenizer_is_needed_where_there_is_no_grammar():
    guide = Grammars(None, 64, EOS).compile(None, 7, SamplingParams(max_thinking_tokens=0))
    guide.prepare([7, 3])
    assert guide.mask(0).nonzero().flatten().tolist() == [7] and guide.mask(1).sum() == 63 and guide.mask(2) is None
    with pytest.raises(RequestError, match=r"no tokenizer\.json"):
        Grammars(None, 64, EOS).compile(KINDS["regex"], None, PARAMS)


@both
def test_text_before_a_call_is_free_and_a_quoted_tag_is_text(home):
    guide = GRAMMARS[home].compile(Constraint("tool_call", DECLARED), None, PARAMS)
    encode = tokenizer(HOMES[home][0]).encode
    for token in encode("It writes `<｜DSML｜tool_calls>`. Now:", allow_special=True):
        guide.accept(token)
        guide.prepare([token])
        assert guide.mask(0) is None and guide.usable([token, EOS]) == 2
    for token in encode("\n\n<｜DSML｜", allow_special=True):
        guide.accept(token)
    assert text_of(home, guide.forced()).startswith("tool_calls>\n<｜DSML｜inv")


@both
def test_one_call_or_several(home):
    encode, ids = tokenizer(HOMES[home][0]).encode, block(("read", {"path": "a"}), ("read", {"path": "b"}))
    for parallel in (True, False):
        guide = GRAMMARS[home].compile(Constraint("tool_call", DECLARED, parallel=parallel), None, PARAMS)
        assert (guide.usable(encode(ids, allow_special=True)) == len(encode(ids, allow_special=True))) == parallel


@both
def test_a_required_call_opens_its_block_unless_the_prompt_did(home):
    encode = tokenizer(HOMES[home][0]).encode
    inside = encode("<｜Assistant｜></think>\n\n<｜DSML｜tool_calls>\n", allow_special=True)
    outside = encode("<｜Assistant｜></think>I will", allow_special=True)
    compile = GRAMMARS[home].compile
    for prompt, opening in (
        (inside, "<｜DSML｜invoke"),
        ((), "<｜DSML｜invoke"),
        (outside, "\n\n<｜DSML｜tool_calls>\n"),
    ):
        guide = compile(KINDS["tool_call_required"], None, PARAMS, prompt)
        assert guide.usable(encode(opening, allow_special=True)) == len(encode(opening, allow_special=True))


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_stop_ids_end_an_answer_only_where_it_is_complete(ignore_eos):
    stop = id_of("nano", "<｜User｜>")
    params = SamplingParams(stop_token_ids=(stop, 10**9), ignore_eos=ignore_eos)
    guide = GRAMMARS["nano"].compile(Constraint("regex", "ab+"), None, params)
    for letter in "ab":
        guide.prepare([])
        assert not guide.mask(0)[stop] and not guide.mask(0)[EOS]
        guide.accept(tokenizer(NANO).encode(letter)[0])
    guide.prepare([stop])
    assert guide.mask(0)[stop] and bool(guide.mask(0)[EOS]) == (not ignore_eos) and not guide.is_finished
    guide.accept(stop)
    assert guide.is_finished


@both
def test_forced_text_that_spells_a_control_token_is_plain(home):
    guide = GRAMMARS[home].compile(Constraint("json", '{"const": "a<｜User｜>｜DSML｜"}'), None, PARAMS)
    ids = draw(home, guide, 0)
    assert text_of(home, ids) == '"a<｜User｜>｜DSML｜"'
    assert not set(tokenizer(HOMES[home][0]).control_tokens.values()) & set(ids[:-1])


@both
def test_a_constraint_that_does_not_wait_binds_open_reasoning_too(home):
    guide = GRAMMARS[home].compile(KINDS["regex"], id_of(home, "</think>"), PARAMS)
    fits("regex", home, draw(home, guide, 1))


def test_json_takes_any_character_and_no_half_of_one():
    guide = GRAMMARS["official"].compile(Constraint("json", '{"type": "string"}'), None, PARAMS)
    for text, good in (('"😀é\\n"', True), (r'"\ud83d"', False), (r'"\ud83d\ude00"', False)):
        ids = tokenizer().encode(text)
        assert (guide.usable(ids) == len(ids)) == good


@pytest.mark.parametrize(
    ("kind", "schema", "message"),
    [
        ("regex", "(", "unclosed group"), ("regex", "(?!a)b", "look-around"), ("regex", "\ud800", "surrogates"),
        ("lark", "start: FOO", 'unknown name: "FOO"'), ("json", "{", "property name"), ("json", "[]", "is an object"),
        ("json", "false", "is an object"), ("json", '{"type": "foo"}', "Invalid type: foo"),
        ("json", '{"not": {}}', "not"), ("tool_call", "[]", "declare one"), ("poem", "", "'poem' is unknown"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_grammar_is_refused_by_name(kind, schema, message):
    with pytest.raises(RequestError, match=re.escape(message)):
        GRAMMARS["nano"].compile(Constraint(kind, schema), None, PARAMS)


def test_other_requests_that_cannot_be_met_are_refused(tmp_path):
    with pytest.raises(RequestError, match="leaves none open"):
        GRAMMARS["nano"].compile(Constraint("regex", "a", after_reasoning=True), None, PARAMS)
    outside = HOMES["nano"][1] + 88
    with pytest.raises(RequestError, match=f"think_end is {outside}"):
        GRAMMARS["nano"].compile(None, outside, PARAMS)
    with pytest.raises(RequestError, match=f"{tokenizer(NANO).vocab_size} ids and the network 100"):
        Grammars(NANO / "tokenizer.json", 100, EOS).compile(KINDS["regex"], None, PARAMS)
    (tmp_path / "t.json").write_text("{}", encoding="utf-8")
    with pytest.raises(RequestError, match="no usable tokenizer"):
        Grammars(tmp_path / "t.json", 100, EOS).compile(KINDS["regex"], None, PARAMS)


def test_a_grammar_that_is_stuck_ends_that_answer_alone():
    letter, end = tokenizer(NANO).encode("b")[0], tokenizer(NANO).encode("c")[0]
    guide = GRAMMARS["nano"].compile(Constraint("regex", "a|bc"), None, SamplingParams(stop_token_ids=(end,)))
    guide.accept(letter)
    guide.prepare([])
    with pytest.raises(EngineError, match="regex constraint allows no token after 1"):
        guide.mask(0)
    fresh = GRAMMARS["nano"].compile(Constraint("regex", "a|bc"), None, PARAMS)
    with pytest.raises(EngineError, match="does not fit the regex constraint"):
        fresh.accept(tokenizer(NANO).encode("z")[0])


def test_compiled_grammars_are_kept_and_bounded():
    grammars, kept = Grammars(NANO / "tokenizer.json", HOMES["nano"][1], EOS), []
    for n in range(MAX_CACHED + 5):
        grammars.compile(Constraint("regex", f"a{{{n + 1}}}"), None, PARAMS)
        grammars.compile(KINDS["regex"], None, PARAMS).accept(tokenizer(NANO).encode("a")[0])
        kept.append(grammars._compiled["regex", KINDS["regex"].schema, True, "tag", None])
    assert len(grammars._compiled) == MAX_CACHED and kept[0] is kept[-1]
