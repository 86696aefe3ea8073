"""ALFWorld's text engine (textworld's PDDL environment) made fast, and a process that plays it.

The stock engine does the same work again at every turn: it parses the templates of its text
grammar and its queries, and deep-copies symbols. At every reset it translates the game from PDDL
to the planner's format, twice. None of that depends on how the game stands, so `speed_up` caches
the results. Observations and admissible commands stay the same, byte for byte.
"""

import ast
import json
import multiprocessing
import os
import pickle
import re
import shutil
import sys
import zlib
from contextlib import suppress
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path
from subprocess import DEVNULL, Popen

from support.run_folder import ROOT
from worlds import private
from worlds.alfworld_generate import generate


def speed_up():
    """Patch textworld in this process. All caches are bounded."""
    import fast_downward
    from textworld.envs.pddl import logic, textgen
    from textworld.logic import Rule

    Rule.parse_conjunctive_query = lru_cache(4096)(Rule.parse_conjunctive_query)
    textgen.deepcopy = light_copy
    translate_once(fast_downward)
    compile_once(textgen)
    parse_once(logic, textgen)
    derive_commands_once(textgen.ContextSensitiveGrammar)


def light_copy(thing):
    """What textgen needs of deepcopy.

    It sets the `context` of symbols and updates dicts, and writes to nothing that they hold.
    """
    if isinstance(thing, dict):
        return dict(thing)
    if isinstance(thing, list):
        return [light_copy(symbol) for symbol in thing]
    new = object.__new__(type(thing))
    new.__dict__.update(thing.__dict__)
    # a ListSymbol also sets the context of the symbol inside
    if hasattr(thing.symbol, "symbol"):
        new.symbol = light_copy(thing.symbol)
    return new


def translate_once(fast_downward):
    """Translate a game from PDDL once."""
    translate = fast_downward.pddl2sas

    # compressed it takes 0.1 MB a game, not 2
    @lru_cache(256)
    def translated(domain, problem):
        return zlib.compress(pickle.dumps(translate(domain, problem)), 1)

    # `optimize` only speeds up the planner, which is not used here: one translation serves for both
    def pddl2sas(domain, problem, verbose=False, optimize=False):
        return pickle.loads(zlib.decompress(translated(domain, problem)))

    fast_downward.pddl2sas = pddl2sas


# what ALFWorld's expressions are made of: o.indefinite + ' ' + o.name, r.name or r.id
EXPRESSION = (ast.Expression, ast.Name, ast.Attribute, ast.Load, ast.Constant)
EXPRESSION += (ast.BinOp, ast.Add, ast.BoolOp, ast.Or)


def compile_expression(text):
    """Raises ValueError for more than names and texts put together: a game file is no program."""
    tree = ast.parse(text.strip(), mode="eval")
    for node in ast.walk(tree):
        private = isinstance(node, ast.Attribute) and node.attr.startswith("_")
        if private or not isinstance(node, EXPRESSION):
            raise ValueError(f"its grammar has code in it: {text!r:.60}")
    return compile(tree, "<grammar>", "eval")


def compile_once(textgen):
    """Compile the expressions in the grammar once. The stock method runs whatever is in them."""
    compiled = lru_cache(4096)(compile_expression)

    # the stock method writes to locals(), which Python 3.13 ignores
    def derive(symbol, context=None):
        variables = (context or symbol.context)["variables"]
        value = eval(compiled(symbol.expression), {"__builtins__": {}}, variables)
        return [textgen.TerminalSymbol(value)]

    textgen.EvalSymbol.derive = derive


def parse_once(logic, textgen):
    """Parse each template once, and once the grammar of all games."""
    parse = lru_cache(4096)(textgen._parse_and_convert)
    parse_shared = lru_cache(4)(logic._parse_and_convert)

    def parse_template(text, rule_name, **_):
        return light_copy(parse(text, rule_name=rule_name))

    # a game's grammar is that of all games but for the sentence that names the task
    def parse_game(text, rule_name):
        head, sentence, tail = re.split(r'(Your task is to: [^"]*)', text, maxsplit=1)
        actions, shared = parse_shared(head + tail, rule_name=rule_name)
        task = textgen.ProductionRule("task", parse(sentence, rule_name="symbols"))
        grammar = textgen.ContextSensitiveGrammar()
        grammar.update(shared)
        grammar._rules["task"] = [task]
        return actions, grammar

    textgen._parse_and_convert = parse_template
    logic._parse_and_convert = parse_game


def derive_commands_once(grammar_class):
    """Fill in a command's template ("open {r}") once a game.

    What it asks for never changes: names, and which receptacle is where.
    """
    derive = grammar_class.derive

    def derive_once(grammar, template, context={}):
        # not the template of a command, but what the player reads
        if template.startswith("#"):
            return derive(grammar, template, context)
        # a grammar belongs to one loaded game, and so does its cache
        cache = grammar.__dict__.setdefault("commands", {})
        names = [(slot.name, entity.name) for slot, entity in context["mapping"].items()]
        key = (template, *names)
        if key not in cache:
            cache[key] = derive(grammar, template, context)
        return cache[key]

    grammar_class.derive = derive_once


def make_env():
    """The environment of AlfredTWEnv, without its scan of every game at first, and without gym."""
    from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
    from textworld import EnvInfos
    from textworld.envs import PddlEnv

    infos = EnvInfos(won=True, admissible_commands=True)
    return AlfredDemangler(PddlEnv(infos), shuffle=False)


class Player:
    """(In a worker.) The environments, one a slot.

    Each costs 4.5 MB that is never freed, so they are made once and used again.
    """

    def __init__(self):
        # slot -> (environment, the game that it has read)
        self.envs = {}
        self.read = lru_cache(64)(self.read)

    def read(self, game):
        """A game as a dict. game: a path, or (split, task type, index) of a generated one."""
        if isinstance(game, str):
            return json.loads(Path(game).read_bytes())
        return generate(*game)

    def play(self, slot, data):
        """Begin a game in a slot -> its first state."""
        env, loaded = self.envs.get(slot) or (make_env(), None)
        # until it is read: it may be a broken file
        self.envs[slot] = env, None
        if loaded is not data:
            env.load(data)
        self.envs[slot] = env, data
        return env.reset()

    def answer(self, kind, slot, what):
        """Answer one request.

        load: begin the game `what` -> as step, or None if it is marked unsolvable.
        step: send the command `what` -> (reply, admissible commands, won).
        walkthrough: -> that of the game `what`, or None.
        """
        if kind == "walkthrough":
            return self.read(what).get("walkthrough")
        if kind == "step":
            state, *_ = self.envs[slot][0].step(what)
        else:
            data = self.read(what)
            if data.get("solvable") is False:
                return None
            state = self.play(slot, data)
        return state.feedback, tuple(state["admissible_commands"]), state["won"]


def serve(connection):
    """(In a worker.) Answer batches of requests. A request that fails is answered with the reason.

    Raises EOFError or OSError when the other end is closed, or its process dead.
    """
    speed_up()
    player = Player()
    while True:
        batch, answers = connection.recv(), []
        for request in batch:
            # nothing is sent before the answers: if there is something, the parent is gone
            if connection.poll():
                return
            try:
                answers.append(player.answer(*request))
            except Exception as error:
                # of many kinds, for a game that cannot be read
                answers.append(f"{type(error).__name__}: {error}".splitlines()[0])
        connection.send(answers)


class Worker:
    """A process that runs `serve`.

    It is no fork, as the parent has torch's threads, and not one of multiprocessing's, which import
    the main script again.
    """

    # seconds; the longest batch takes one or two minutes
    patience = 600

    def __init__(self):
        self.process = None
        self.launch()

    def launch(self):
        """Begin the process, or replace it: what it was playing is gone."""
        self.close()
        self.pipe, theirs = multiprocessing.Pipe()
        descriptor = theirs.fileno()
        self.folder = private.folder()
        environment = private.environment()
        paths = filter(None, [ROOT, environment.get("PYTHONPATH")])
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        # alfworld makes a folder when it is imported: not where the user's games should be
        environment |= dict.fromkeys(("ALFWORLD_DATA", "TMPDIR"), self.folder.name)
        # -P: no module comes from the current folder. A session of its own: Ctrl-C is for us.
        command = [sys.executable, "-P", "-m", "worlds.alfworld_engine", str(descriptor)]
        how = dict(stdin=DEVNULL, stdout=DEVNULL, env=environment, start_new_session=True)
        self.process = Popen([*command, self.folder.name], pass_fds=[descriptor], **how)
        theirs.close()

    def ask(self, batch):
        """Send a batch of requests (kind, slot, what), see Player.answer."""
        # if the process died, answers() will say so
        with suppress(OSError):
            self.pipe.send(batch)

    def answers(self):
        """The answers to the batch asked last, or None if the process died or hangs.

        Then it has been replaced.
        """
        with suppress(EOFError, OSError):
            if self.pipe.poll(self.patience):
                return self.pipe.recv()
        self.launch()
        return None

    def close(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.pipe.close()
            self.folder.cleanup()


if __name__ == "__main__":
    descriptor, own_folder = sys.argv[1:]
    with suppress(EOFError, OSError):
        serve(Connection(int(descriptor)))
    # so that nothing is left when the parent was killed
    shutil.rmtree(own_folder, ignore_errors=True)
