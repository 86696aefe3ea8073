"""The architectures of docs/models.md, each a small random model; and what `prove` finds."""

import os
import re

import pytest
import torch
from safetensors.torch import save_file
from test_models import TEMPLATE, move, save
from test_rollout import close, scored

from policy import ASKS, load_policy, save_model, trained
from rollout import Turn, generate, prove
from support.forward import shareable
from support.run_folder import ROOT, SetupError
from worlds.keyquest import KeyQuest

WHOLE, ONCE = "whole", "once"
MAMBA = dict(mamba_n_heads=6, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1)
LINEAR = {f"linear_{x}_head_dim": 16 for x in ("key", "value")}
LINEAR |= dict(linear_num_value_heads=4, linear_num_key_heads=2)
MOE = dict(num_experts=4, num_experts_per_tok=2)
both = lambda first, second: dict(layer_types=[first, second])
WINDOW = both("sliding_attention", "full_attention") | dict(sliding_window=24)
GRANITE = dict(num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=32)
# as in docs/models.md: the name, whether LoRA fits, how the prefix of the prompts is read
ROWS = [
    ("Llama 3", "yes", ONCE, "llama", {}),
    ("Qwen2.5", "yes", ONCE, "qwen2", {}),
    ("Qwen3", "yes", ONCE, "qwen3", {}),
    ("Qwen3-MoE", "yes", ONCE, "qwen3_moe", MOE | dict(moe_intermediate_size=32)),
    ("Qwen3.5", "yes", WHOLE, "qwen3_5_text", both("linear_attention", "full_attention") | LINEAR),
    ("Gemma 2", "yes", WHOLE, "gemma2", WINDOW | dict(final_logit_softcapping=2.0)),
    ("Gemma 3", "yes", WHOLE, "gemma3_text", WINDOW),
    ("Mistral", "yes", ONCE, "mistral", dict(sliding_window=None)),
    ("Phi-3", "yes", ONCE, "phi3", {}),
    ("SmolLM2", "yes", ONCE, "llama", dict(num_key_value_heads=4)),
    ("SmolLM3", "yes", ONCE, "smollm3", dict(no_rope_layers=[1, 0])),
    ("OLMo 2", "yes", ONCE, "olmo2", {}),
    ("OLMo 3", "yes", WHOLE, "olmo3", WINDOW),
    ("gpt-oss", "yes", WHOLE, "gpt_oss", WINDOW | dict(num_local_experts=4, num_experts_per_tok=2)),
    ("Granite 4", "yes", WHOLE, "granitemoehybrid", both("mamba", "attention") | MAMBA | GRANITE
     | dict(logits_scaling=8.0)),
    ("LFM2", "yes", WHOLE, "lfm2", both("conv", "full_attention")),
    ("Falcon-H1", "no", WHOLE, "falcon_h1", MAMBA | dict(mamba_d_ssm=96, lm_head_multiplier=0.3)),
]  # fmt: skip
# kind, settings, LoRA rank, what the line says
REFUSED = [
    ("llama4_text", dict(num_local_experts=2, intermediate_size_mlp=96), 0, "last_hidden_state"),
    ("rwkv", dict(attention_hidden_size=48), 0, "as sampled are off by"),
    ("recurrent_gemma", dict(lru_width=48, num_hidden_layers=3), 0, "are off by"),
    ("phimoe", GRANITE, 2, "AttributeError"),
    ("mamba2", dict(state_size=8, head_dim=16, num_heads=6, n_groups=1), 0, "as sampled"),
    ("falcon_h1", ROWS[-1][-1], 2, "no adapter"),
]


def check_against_the_plain_model(policy):
    """Rows that share a prefix, of other lengths, one twice, that end at other times."""
    policy.end = [*policy.end, *range(0, 800, 6)]
    prefix = list(range(20, 60))
    prompts = [prefix + [7, 8, 9] * n for n in (1, 4, 9, 9)]
    samples = generate(policy, prompts, 1.0, 6, torch.Generator().manual_seed(1))
    turns = [Turn(0, prompt, *sample) for prompt, sample in zip(prompts, samples)]
    assert len({len(turn.response) for turn in turns}) > 1
    plain = []
    for turn in turns:
        ids = torch.tensor([turn.prompt + turn.response])
        logits = policy.model(ids, use_cache=False).logits[0]
        log_p = logits.log_softmax(-1)
        for place, token in enumerate(turn.response, len(turn.prompt)):
            plain.append(log_p[place - 1, token])
    plain = torch.stack(plain)
    sampled = sum([turn.logp for turn in turns], [])
    close(torch.tensor(sampled), plain, atol=1e-3)
    close(scored(policy, turns)[0], plain, atol=1e-3)
    return shareable(policy.model, prompts)[1]


@pytest.mark.parametrize("name, lora, prompts, kind, settings", ROWS, ids=[r[0] for r in ROWS])
@torch.no_grad()
def test_an_architecture_of_the_table(name, lora, prompts, kind, settings, tmp_path, capsys):
    folder = save(tmp_path, architecture=kind, **settings)
    policy = load_policy(folder, "keyquest")
    prove(policy)
    assert capsys.readouterr().out == ""
    shared = check_against_the_plain_model(policy)
    assert (shared > 0) == (prompts == ONCE)
    if lora != "yes":
        return
    policy = load_policy(folder, "keyquest", lora_rank=2)
    before = [p.clone() for p in trained(policy.model).values()]
    chance = torch.get_rng_state()
    prove(policy)
    assert all(map(torch.equal, before, trained(policy.model).values()))
    assert torch.equal(torch.get_rng_state(), chance)
    move(policy)
    check_against_the_plain_model(policy)
    again = str(tmp_path / "again")
    save_model(policy, dict.fromkeys(ASKS), again)
    model = load_policy(again, "keyquest").model
    ids = torch.arange(40)[None]
    close(model(ids).logits, policy.model(ids).logits, atol=1e-3)


def test_the_page_has_the_rows_that_are_tested():
    with open(os.path.join(ROOT, "docs", "models.md")) as file:
        lines = re.findall(r"^\| (.*) \| (yes|no) \| (.*) \|$", file.read(), re.MULTILINE)
    on_page = []
    for names, lora, prompts in lines:
        on_page += [(name, lora, prompts) for name in names.split(", ")]
    assert sorted(on_page) == sorted(row[:3] for row in ROWS)


@pytest.mark.parametrize("kind, settings, rank, line", REFUSED, ids=[row[0] for row in REFUSED])
def test_what_does_not_fit_is_refused_in_one_line(kind, settings, rank, line, tmp_path):
    folder = save(tmp_path, architecture=kind, **settings)
    with pytest.raises(SetupError, match=f"cannot be trained here: .*{line}") as error:
        prove(load_policy(folder, "keyquest", lora_rank=rank))
    assert "\n" not in str(error.value)


def test_a_shortcut_that_is_wrong_is_left_out(tmp_path, capsys):
    settings = dict(num_layers=2, num_heads=4, window_size=20, initializer_range=0.1)
    settings |= dict(architecture="gpt_neo", attention_types=[[["global", "local"], 1]])
    policy = load_policy(save(tmp_path, **settings), "keyquest")
    # as if its configuration did not say so
    policy.model.shortcuts = policy.model.base_model.shortcuts = True
    prove(policy)
    assert re.search("each prompt is read whole: .* off by .* nats", capsys.readouterr().out)
    assert check_against_the_plain_model(policy) == 0


LONGROPE = dict(rope_type="longrope", short_factor=[1.0] * 6, long_factor=[4.0] * 6)


@pytest.mark.parametrize(
    "kind, settings, room",
    [
        ("gpt2", dict(n_positions=64, n_embd=48, n_head=4), 64),
        ("llama", dict(max_position_embeddings=70), 70),
        ("phi3", dict(rope_parameters=LONGROPE, original_max_position_embeddings=80), 80),
    ],
)
def test_a_row_that_the_context_has_no_room_for_is_refused(kind, settings, room, tmp_path):
    policy = load_policy(save(tmp_path, architecture=kind, **settings), "keyquest")
    prove(policy)
    fits = [5] * (room - 8)
    generate(policy, [fits], 1.0, 8)
    line = f"room for {room} tokens, and {room + 1} are needed"
    with pytest.raises(SetupError, match=line):
        generate(policy, [[5, 6], fits + [5]], 1.0, 8)


# a template is a program
TEMPLATES = ["", "{{ raise_exception('no') }}", "{{ 1 / 0 }}"]


@pytest.mark.parametrize("template", [TEMPLATE, *TEMPLATES])
def test_a_folder_that_lacks_something_is_refused(template, tmp_path):
    folder = save(tmp_path, template=template)
    if template == TEMPLATE:
        save_file({}, os.path.join(folder, "model.safetensors"), {"format": "pt"})
    with pytest.raises(SetupError, match="lacks weights, such as|no chat template"):
        load_policy(folder, "keyquest")


@pytest.mark.parametrize("opening", ["", "<think>"])
def test_the_templates_switch_follows_think_and_a_thought_is_not_played(opening, tmp_path):
    switch = "{{ '%s' if enable_thinking else '<think></think>' }}" % opening
    template = TEMPLATE.replace("agent ", switch)
    folder, world = save(tmp_path, template=template), KeyQuest()
    (now,) = world.reset(world.tasks("train")[:1])
    off = load_policy(folder, "keyquest", think="off")
    assert off.prompt(world, [], now).endswith("<think></think>")
    on = load_policy(folder, "keyquest", think="on")
    assert on.opening == opening
    assert on.prompt(world, [], now).endswith(opening)
    thought = "I may <action>look</action>"
    if not opening:
        thought = f"<think>{thought}"
    whole = thought + " so.</think><action>East</action>"
    for said, action in ((thought, None), (whole, "east")):
        ids = on.tokenizer.encode(said, add_special_tokens=False)
        goes_on = on.unfinished(torch.tensor(ids[-1:]), [ids]).item()
        assert goes_on == (action is None)
        assert world.parse_chat(on.opening + said) == action
