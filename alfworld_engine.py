"""ALFWorld's text engine (textworld's PDDL environment) made fast, and a plain worker process that plays many games with it.

The stock engine does the same work again at every turn: it parses the templates of its text grammar and its queries, and
deep-copies symbols; at every reset it translates the game from PDDL to the planner's format, twice. None of that depends on
how the game stands, so `speed_up` keeps the results. Observations and admissible commands stay the same, byte for byte.
"""
import json
import multiprocessing
import multiprocessing.connection
import os
import pickle
import re
import subprocess
import sys
import tempfile
import zlib
from functools import lru_cache


def speed_up():
    """Patch textworld in this process. All caches are bounded."""
    import fast_downward
    from textworld.envs.pddl import logic, textgen
    from textworld.logic import Rule

    def light_copy(thing):
        """What textgen needs of deepcopy: it sets the `context` of symbols and updates dicts, and writes to nothing they hold."""
        if isinstance(thing, dict):
            return dict(thing)
        if isinstance(thing, list):
            return [light_copy(symbol) for symbol in thing]
        new = object.__new__(type(thing))
        new.__dict__.update(thing.__dict__)
        if isinstance(thing, textgen.ListSymbol):                    # sets the context of the symbol inside, too
            new.symbol = light_copy(thing.symbol)
        return new

    def evaluate(symbol, context=None):
        """EvalSymbol.derive, compiled once (the stock one relies on writing to locals(), which Python 3.13 ignores)."""
        return [textgen.TerminalSymbol(eval(compiled(symbol.expression), {}, (context or symbol.context)["variables"]))]

    def pddl2sas(domain, problem, verbose=False, optimize=False):
        """`optimize` only speeds up the planner, which nobody asks here: one translation serves for both."""
        return pickle.loads(zlib.decompress(translated(domain, problem)))

    def command(grammar, start, context={}):
        """ContextSensitiveGrammar.derive; a command template ("open {r}") is filled in once a game, as what it asks for never
        changes: names, and which receptacle is where. `grammar` belongs to one loaded game."""
        if start.startswith("#"):                                    # not a template, but what the player reads
            return derive(grammar, start, context)
        known = grammar.__dict__.setdefault("commands", {})
        key = (start, *((p.name, v.name) for p, v in context["mapping"].items()))
        if key not in known:
            known[key] = derive(grammar, start, context)
        return known[key]

    def parse_game(text, rule_name):
        """A game's own grammar: that of all games but for the sentence that tells the task."""
        head, sentence, tail = re.split(r'(Your task is to: [^"]*)', text, maxsplit=1)
        actions, shared = parse_shared(head + tail, rule_name=rule_name)
        grammar = textgen.ContextSensitiveGrammar()
        grammar.update(shared)
        grammar._rules["task"] = [textgen.ProductionRule("task", parse(sentence, rule_name="symbols"))]
        return actions, grammar

    translate, derive = fast_downward.pddl2sas, textgen.ContextSensitiveGrammar.derive
    translated = lru_cache(256)(lambda *game: zlib.compress(pickle.dumps(translate(*game)), 1))     # 0.1 MB, not 2, a game
    compiled = lru_cache(4096)(lambda expression: compile(expression, "<grammar>", "eval"))
    parse = lru_cache(4096)(textgen._parse_and_convert)
    textgen.deepcopy = light_copy
    textgen._parse_and_convert = lambda text, rule_name, **_: light_copy(parse(text, rule_name=rule_name))
    textgen.EvalSymbol.derive = evaluate
    textgen.ContextSensitiveGrammar.derive = command
    parse_shared, logic._parse_and_convert = lru_cache(4)(logic._parse_and_convert), parse_game
    Rule.parse_conjunctive_query = lru_cache(4096)(Rule.parse_conjunctive_query)
    fast_downward.pddl2sas = pddl2sas


def make_env():
    """The environment that AlfredTWEnv makes, without its start-up scan of every game, and without gym."""
    from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
    from textworld import EnvInfos
    from textworld.envs import PddlEnv
    return AlfredDemangler(PddlEnv(EnvInfos(won=True, admissible_commands=True)), shuffle=False)


class Player:
    """(In a worker.) The environments, one a slot: each costs 4.5 MB never to be freed, so they are made once and used again."""

    def __init__(self):
        self.envs, self.loaded = {}, {}              # loaded: slot -> the game that its environment has read
        self.read = lru_cache(64)(self.read)

    def read(self, game):
        """A game as a dict: a path, or (split, task type, index) of a generated one, which must be solved before it is used."""
        if isinstance(game, str):
            with open(game) as file:
                return json.load(file)
        from alfworld_generate import generate
        data = generate(*game)
        self.play("check", data)
        if not [self.envs["check"].step(command) for command in data["walkthrough"]][-1][0]["won"]:
            raise ValueError("its own solution does not solve it")
        return data

    def play(self, slot, data):
        """Put `slot` at the start of a game."""
        env = self.envs[slot] = self.envs.get(slot) or make_env()
        if self.loaded.get(slot) is not data:
            self.loaded[slot] = None                 # until it is read: it may be a broken file
            env.load(data)
            self.loaded[slot] = data
        return env.reset()

    def answer(self, kind, slot, what):
        """load: start the game `what` -> as step, or None if it is marked unsolvable. walkthrough: of the game `what`.
        step: send the command `what` -> (reply, admissible commands, won)."""
        if kind == "walkthrough":
            return self.read(what).get("walkthrough")
        if kind == "load":
            data = self.read(what)
            if data.get("solvable") is False:
                return None
            state = self.play(slot, data)
        else:
            state = self.envs[slot].step(what)[0]
        return state.feedback, tuple(state["admissible_commands"]), state["won"]


def serve(connection):
    """(In a worker.) Answer batches of requests until the other end is gone: closed, or its process dead."""
    speed_up()
    player = Player()
    while True:
        try:
            batch, answers = connection.recv(), []
        except EOFError:
            return
        for request in batch:
            if connection.poll():                    # nothing is sent before we have answered: the parent is gone
                return
            try:
                answers.append(player.answer(*request))
            except Exception as error:               # of many kinds, for a game that can't be read
                answers.append(f"{type(error).__name__}: {error}".splitlines()[0])
        connection.send(answers)


class Worker:
    """A process that runs `serve`. No fork (the parent has torch's threads), no multiprocessing (it imports the main script)."""

    patience = 600                                   # seconds; the longest batch takes one or two minutes

    def __init__(self):
        self.process = None
        self.start()

    def start(self):
        """Start the process, or replace it: what it was playing is gone."""
        self.close()
        self.pipe, theirs = multiprocessing.Pipe()
        # alfworld makes the folder ALFWORLD_DATA when it is imported: not here. New session: Ctrl-C is for the parent.
        self.process = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), str(theirs.fileno())], pass_fds=[theirs.fileno()], start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env={**os.environ, "ALFWORLD_DATA": tempfile.gettempdir()})
        theirs.close()

    def ask(self, batch):
        try:
            self.pipe.send(batch)
        except OSError:                              # the process died: answers() will say so
            pass

    def answers(self):
        """The answers to the batch asked last, or None if the process died or hangs; then it has been replaced."""
        try:
            if self.pipe.poll(self.patience):
                return self.pipe.recv()
        except (EOFError, OSError):
            pass
        self.start()

    def close(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.pipe.close()


if __name__ == "__main__":
    try:
        serve(multiprocessing.connection.Connection(int(sys.argv[1])))
    except OSError:                                  # the parent is gone in the middle of a message
        pass
