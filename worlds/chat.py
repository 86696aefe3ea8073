"""The prompts of chat models: one message has the rules, another what is seen at a turn."""

THINK_FIRST = (
    "First reason about the next step in <think>…</think>, then write exactly one action in "
    "<action>…</action>."
)
ACTION_ALONE = "Reply with one action in <action>…</action> and nothing else."


def messages(rules, state, past, think):
    """-> a chat template's messages: the rules, the state. think: whether to reason first.

    Without a system message of ours, some templates put in one of theirs.
    """
    form = THINK_FIRST if think else ACTION_ALONE
    if past and past[-1][1] is None:
        state = f"Your last reply had no action. {form}\n\n{state}"
    rules = f"{rules}\n\n{form}"
    return [{"role": "system", "content": rules}, {"role": "user", "content": state}]


def templated(tokenizer, messages, system_role):
    """The text of a prompt. system_role: the chat template has one; else all is the user's."""
    if not system_role:
        text = "\n\n".join(message["content"] for message in messages)
        messages = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def long_state(past, now, objects_are):
    """What the agent knows, with its last two turns (as the paper). objects_are: their title."""
    parts = [f"Task: {now.goal}", f"Turns taken so far: {len(past)}"]
    for before, action in past[-2:]:
        parts.append(f"Earlier observation: {before.reply.strip()}")
        parts.append(f"Your action then: {action or '(none that was valid)'}")
    parts += ["", f"Observation now: {now.reply.strip()}"]
    parts += [now.look.strip(), now.inventory.strip()]
    # ALFWorld has it, and it is of no use
    objects = [name for name in now.objects if name != "help"]
    if objects:
        parts.append(f"{objects_are}: {', '.join(objects)}")
    return "\n".join(parts)
