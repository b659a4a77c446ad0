"""A fictional world from a seed: its facts, questions over them, a teacher with a flaw, the real tools.

Everything is invented, so no model can know it from elsewhere: what the ToolActor knows it has learned here,
and what AutoAgent answers it has been told by a tool."""
import json
import random
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from data.tools import compare

# relation: (kind of its subject, kind of its value, what the tool says of itself). Numbers are given as text, as by
# many a web API: the miniature then learns to copy a digit as it learns to copy a name, and much later otherwise.
RELATIONS = {
    "birthplace": ("person", "city", "The city where a person was born."),
    "employer": ("person", "company", "The company that a person works for."),
    "spouse": ("person", "person", "The person whom a person is married to."),
    "father": ("person", "person", "The father of a person."),
    "teacher": ("person", "person", "The person who taught a person."),
    "home": ("person", "city", "The city where a person lives."),
    "score": ("person", "number", "The score of a person in a game."),
    "headquarters": ("company", "city", "The city where a company sits."),
    "founder": ("company", "person", "The person who founded a company."),
    "size": ("company", "number", "The size of a company on a scale."),
    "country": ("city", "country", "The country where a city lies."),
    "mayor": ("city", "person", "The mayor of a city."),
    "capital": ("country", "city", "The capital of a country."),
    "language": ("country", "language", "The language that a country speaks."),
    "currency": ("country", "currency", "The money that a country uses."),
}
SIZES = {"person": 32, "company": 10, "city": 16, "country": 8, "language": 8, "currency": 8}
# Said in one word, looked up in several steps; the steps in the order of the lookups.
INFERENCE = {
    "grandfather": ("father", "father"),
    "father-in-law": ("spouse", "father"),
    "boss": ("employer", "founder"),
    "native language": ("birthplace", "country", "language"),
    "home currency": ("birthplace", "country", "currency"),
}
# What a comparison asks for, one word for each relation: with either word for both, some seeds never learned to read which.
COMPARED = {"score": "largest", "size": "smallest"}
HELD_OUT = ("hotpot", "musique", "2wiki", "bamboogle")  # each in the manner of the benchmark of that name
SILLY = {("country", "capital"), ("capital", "country")}  # a step back to where the question came from


@dataclass(frozen=True)
class Question:
    """One question. golds are the accepted answers: for the scorer alone, no prompt ever holds them."""
    id: str
    text: str
    golds: list[str]
    set: str                       # "train" or one of HELD_OUT
    kind: str                      # what the ToolMaker should call it
    steps: list[tuple[str, str]]   # (relation, subject) of each lookup, in order
    chain: tuple[str, ...]         # the entities it passes through; a comparison's two, sorted


@dataclass
class World:
    """Entities and facts. Inside sealed() any look at the facts raises: a rollout can't fall back to a lookup."""
    seed: int
    names: dict[str, list[str]]
    _facts: dict[tuple[str, str], str] = field(repr=False)
    _open: bool = True

    @property
    def facts(self) -> dict[tuple[str, str], str]:
        """(relation, subject) -> value."""
        if not self._open:
            raise PermissionError("the world's facts are sealed while a model plays its tools")
        return self._facts

    @contextmanager
    def sealed(self):
        """While this is entered, the facts are out of reach."""
        was, self._open = self._open, False
        try:
            yield
        finally:
            self._open = was

    def real(self, name: str, arguments: dict) -> dict:
        """The real tool: the fact, under its relation's name, or an error."""
        subject = next(iter(arguments.values()), None)
        if name not in RELATIONS or not isinstance(subject, str) or (name, subject) not in self.facts:
            return unknown(name)
        return {name: self.facts[name, subject]}


def unknown(relation: str) -> dict:
    """What a tool answers that has no such fact."""
    return {"error": f"no {relation} found"}


def make_world(seed: int) -> World:
    """The world of a seed; the same seed, the same world."""
    rng, used = random.Random(f"names {seed}"), set()
    names = {kind: [_name(rng, used) for _ in range(n)] for kind, n in SIZES.items()}
    return World(seed, names, _draw_facts(names, random.Random(f"facts {seed}")))


def imagine(world: World, number: int) -> World:
    """The same names, other facts: a world to learn the grammar of traces in, but no fact of the true one."""
    return World(world.seed, world.names, _draw_facts(world.names, random.Random(f"imagined {world.seed} {number}")))


def _draw(names: dict[str, list[str]], kind: str, rng: random.Random) -> str:
    """Anything of a kind."""
    return str(rng.randrange(1, 10)) if kind == "number" else rng.choice(names[kind])


def _draw_facts(names: dict[str, list[str]], rng: random.Random) -> dict[tuple[str, str], str]:
    facts: dict[tuple[str, str], str] = {}
    people = rng.sample(names["person"], SIZES["person"])
    for i, person in enumerate(people):  # in the order of their birth: four generations of four couples
        facts["birthplace", person] = rng.choice(names["city"])
        facts["home", person] = rng.choice(names["city"])
        facts["employer", person] = rng.choice(names["company"])
        facts["spouse", person] = people[i ^ 1]
        facts["score", person] = _draw(names, "number", rng)
        if i >= 8:  # of the eldest nothing is known before themselves
            elders = people[(i // 8 - 1) * 8:i // 8 * 8]
            facts["father", person], facts["teacher", person] = rng.choice(elders), rng.choice(elders)
    for company in names["company"]:
        facts["headquarters", company] = rng.choice(names["city"])
        facts["founder", company] = rng.choice(people)
        facts["size", company] = _draw(names, "number", rng)
    for i, city in enumerate(rng.sample(names["city"], SIZES["city"])):
        country = names["country"][i % SIZES["country"]]
        facts["country", city] = country
        facts["mayor", city] = rng.choice(people)
        if i < SIZES["country"]:
            facts["capital", country] = city
            facts["language", country] = rng.choice(names["language"])
            facts["currency", country] = rng.choice(names["currency"])
    return facts


def _name(rng: random.Random, used: set[str]) -> str:
    while True:
        name = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(2)).capitalize()
        name += rng.choice(["", "n", "r", "s", "x", "l"])
        if name not in used:
            used.add(name)
            return name


def tool_for(relation: str) -> dict:
    """The tool that looks a relation up, as the ToolMaker should write it."""
    subject, _, description = RELATIONS[relation]
    return {"name": relation, "description": description,
            "parameters": {"type": "object", "properties": {subject: {"type": "string"}}, "required": [subject]},
            "returns": {"type": "object", "properties": {relation: {"type": "string"}}, "required": [relation]}}


# ----------------------------------------------------------------------------------------- questions


def make_questions(world: World, each: int = 50) -> list[Question]:
    """Training questions and `each` questions in each held-out set. No held-out chain of entities is a part
    of a training question's chain, and the paths of relations in the bamboogle set are in no training question."""
    rng = random.Random(f"questions {world.seed}")
    paths, unseen = _choose_paths(rng)
    pools = _pools(world, paths, rng) | {"unseen": _compositions(world, unseen)}
    for pool in pools.values():
        rng.shuffle(pool)
    third, quarter, fifth, most = each // 3, each // 4, each // 5, Counter()
    recipe = {"hotpot": (("bridge", each - fifth), ("comparison", fifth)),  # about the benchmarks' own shares
              "musique": (("bridge", third), ("three", third), ("four", each - 2 * third)),
              "2wiki": (("comparison", quarter), ("inference", quarter), ("bridge", each - 2 * quarter)),
              "bamboogle": (("unseen", each),)}
    held_out = []
    for name, parts in recipe.items():
        for pool, n in parts:
            held_out += _take(pools[pool], n, most, limit=max(1, each * len(recipe) // 25), name=name, first=len(held_out))
    del pools["unseen"]
    return _training(pools, held_out) + held_out


def imagined_questions(world: World, number: int, held_out: list[Question]) -> tuple[World, list[Question]]:
    """Training questions of an imagined world, on the same paths; none is a held-out question or shares its chain."""
    paths, _ = _choose_paths(random.Random(f"questions {world.seed}"))
    other = imagine(world, number)
    return other, _training(_pools(other, paths, random.Random(f"imagined {world.seed} {number}")), held_out)


def nonsense(world: World, n: int, held_out: list[Question], rng: random.Random) -> list[tuple[World, Question]]:
    """Questions of two to four relations that need not fit ("the size of the spouse of the capital"), each with a world that
    holds its made-up facts alone; no unseen path, no held-out chain among them. From sensible questions a role learns which
    relation follows which, from these to read the question."""
    unseen, chains = set(_choose_paths(random.Random(f"questions {world.seed}"))[1]), {q.chain for q in held_out}
    texts, made = {q.text for q in held_out}, []
    while len(made) < n:
        path = tuple(rng.sample(list(RELATIONS), rng.randint(2, 4)))
        kinds = [RELATIONS[path[0]][0], *(RELATIONS[relation][1] for relation in path)]
        chain = tuple(_draw(world.names, kind, rng) for kind in kinds)
        text, steps = _text(chain[0], path, path), list(zip(path, chain))
        leaks = {path[:3], path[1:]} & unseen or chains & set(_parts(chain)) or text in texts
        if not leaks and len(set(chain)) == len(chain):
            made.append((World(world.seed, world.names, dict(zip(steps, chain[1:]))),
                         Question("", text, [chain[-1]], "train", "composition", steps, chain)))
    return made


def mixed(questions: list[Question], n: int, rng: random.Random) -> list[Question]:
    """At most n of the questions, shuffled, a sixth of each form or all there are: compositions of 2, 3 and 4 hops,
    inferences, comparisons of scores and of sizes. Comparisons are hardest to learn, hence two of the six."""
    forms: dict[tuple, list[Question]] = {}
    for q in questions:
        form = {"composition": len(q.steps), "comparison": q.steps[0][0]}.get(q.kind)
        forms.setdefault((q.kind, form), []).append(q)
    each = [rng.sample(part, min(len(part), -(-n // len(forms)))) for part in forms.values()]
    return rng.sample(chosen := [q for part in each for q in part], min(n, len(chosen)))


def _choose_paths(rng: random.Random) -> tuple[dict[int, list[tuple[str, ...]]], list[tuple[str, ...]]]:
    """Paths of relations by number of hops, none of them twice in a path; and twelve paths of three hops that are no
    part of any of those."""
    pairs = [(a, b) for a in RELATIONS for b in RELATIONS if RELATIONS[a][1] == RELATIONS[b][0]
             and a != b and (a, b) not in SILLY]
    threes = [(a, b, c) for a, b in pairs for x, c in pairs if x == b and c != a and (a, b, c) not in INFERENCE.values()]
    rng.shuffle(threes)
    unseen, three = threes[:12], threes[12:]
    fours = [(*path, b) for path in three for a, b in pairs
             if path[-1] == a and b not in path and (*path[1:], b) not in unseen]
    return {2: pairs, 3: three, 4: fours}, unseen


def _pools(world: World, paths: dict[int, list[tuple[str, ...]]], rng: random.Random) -> dict[str, list[Question]]:
    return {"bridge": _compositions(world, paths[2]), "three": _compositions(world, paths[3]),
            "four": _compositions(world, paths[4]), "inference": _inferences(world), "comparison": _comparisons(world, rng)}


def _training(pools: dict[str, list[Question]], held_out: list[Question]) -> list[Question]:
    chains, texts = {q.chain for q in held_out}, {q.text for q in held_out}
    train = [q for pool in pools.values() for q in pool if q.text not in texts and not chains & set(_parts(q.chain))]
    return [_numbered(q, "train", i) for i, q in enumerate(train)]


def _parts(chain: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [chain[i:j] for i in range(len(chain)) for j in range(i + 2, len(chain) + 1)]


def _take(pool: list[Question], n: int, most: Counter, limit: int, name: str, first: int) -> list[Question]:
    """Move n questions out of a pool; no answer stands in more than `limit` held-out questions in all."""
    taken = []
    for question in list(pool):
        if len(taken) == n:
            break
        if most[question.golds[0]] < limit:
            most[question.golds[0]] += 1
            pool.remove(question)
            taken.append(_numbered(question, name, first + len(taken)))
    return taken


def _numbered(q: Question, name: str, i: int) -> Question:
    return Question(f"{name}-{q.kind}-{i}", q.text, q.golds, name, q.kind, q.steps, q.chain)


def _walk(world: World, start: str, path: tuple[str, ...]) -> list[str] | None:
    """The entities along a path of relations, or None where the world ends or turns back on itself."""
    chain = [start]
    for relation in path:
        if (relation, chain[-1]) not in world.facts:
            return None
        chain.append(world.facts[relation, chain[-1]])
    return chain if len(set(chain)) == len(chain) else None


def _question(world: World, start: str, path: tuple[str, ...], said: tuple[str, ...], kind: str) -> Question | None:
    chain = _walk(world, start, path)
    return chain and Question("", _text(start, path, said), [chain[-1]], "", kind, list(zip(path, chain)), tuple(chain))


def _text(start: str, path: tuple[str, ...], said: tuple[str, ...]) -> str:
    who = "Who" if RELATIONS[path[-1]][1] == "person" else "What"
    return f"{who} is the {' of the '.join(reversed(said))} of {start}?"


def _compositions(world: World, paths: list[tuple[str, ...]]) -> list[Question]:
    made = [_question(world, start, path, path, "composition")
            for path in paths for start in world.names[RELATIONS[path[0]][0]]]
    return [q for q in made if q]


def _inferences(world: World) -> list[Question]:
    made = [_question(world, start, path, (said,), "inference")
            for said, path in INFERENCE.items() for start in world.names["person"]]
    return [q for q in made if q]


def _comparisons(world: World, rng: random.Random) -> list[Question]:
    """Of two people, whose score is largest; of two companies, whose size is smallest; pairs in either order, values never
    equal."""
    made = []
    for relation, pick in COMPARED.items():
        names = world.names[RELATIONS[relation][0]]
        pairs = [(a, b) for i, a in enumerate(names) for b in names[:i]]
        for a, b in rng.sample(pairs, min(len(pairs), 400)):
            a, b = rng.sample((a, b), 2)
            x, y = world.facts[relation, a], world.facts[relation, b]
            if x != y:
                made.append(Question("", f"Of {a} and {b}, whose {relation} is {pick}?",
                                     [compare([a, b], [x, y], pick)["result"]], "", "comparison",
                                     [(relation, a), (relation, b)], tuple(sorted((a, b)))))
    return made


# ------------------------------------------------------------------------------------------- teacher
# The teacher's grammar is perfect, its strategy is not. It is impatient: in half of its chains of lookups it stops
# one step short and answers with what it has. In one of twenty it makes a lookup twice, and in one of twenty
# traces it guesses without any. Supervised learning takes all of this over; the reward of the second stage has to unteach it.
# A comparison's two lookups stand in one turn, and the next thought tells both values: what is copied then stands near.
# For the same reason the call gives the values before the names.
STOPS_SHORT, REPEATS, GUESSES = 0.5, 0.05, 0.05
ENOUGH, DONE = "That is close enough.", "That was the last step."


def teach_agent(world: World, question: Question, rng: random.Random) -> dict:
    """One conversation of AutoAgent as its teacher would lead it; flawed in strategy, never in grammar."""
    record = {"role": "agent", "question": question.text, "kind": question.kind, "tools": tools_for(question)}
    if rng.random() < GUESSES:
        kind = next((k for k, names in world.names.items() if question.golds[0] in names), "number")
        return {**record, "turns": [{"thought": "I guess.", "answer": _draw(world.names, kind, rng)}]}
    turns = _compare(world, question) if question.kind == "comparison" else _look_up(world, question, rng)
    return {**record, "turns": turns}


def _turn(world: World, thought: str, *steps: tuple[str, str]) -> dict:
    calls = [{"name": relation, "arguments": {RELATIONS[relation][0]: subject}} for relation, subject in steps]
    return {"thought": thought, "calls": calls, "observations": [world.real(c["name"], c["arguments"]) for c in calls]}


def _told(relation: str, subject: str, value: str) -> str:
    return f"The {relation} of {subject} is {value}. "


def _look_up(world: World, question: Question, rng: random.Random) -> list[dict]:
    short = rng.random() < STOPS_SHORT
    steps = question.steps[:-1] if short else question.steps
    again = rng.randrange(len(steps)) if rng.random() < REPEATS else None
    turns, told = [], ""
    for i, (relation, subject) in enumerate(steps):
        need = f"I need the {relation} of {subject}"
        turns.append(_turn(world, f"{told}{need}.", (relation, subject)))
        told = _told(relation, subject, world.facts[relation, subject])
        if i == again:
            turns.append(_turn(world, f"{told}{need} once more.", (relation, subject)))
    return [*turns, {"thought": told + (ENOUGH if short else DONE), "answer": world.facts[steps[-1]]}]


def _compare(world: World, question: Question) -> list[dict]:
    (relation, a), (_, b) = question.steps
    x, y, pick = world.facts[relation, a], world.facts[relation, b], COMPARED[relation]
    call = {"name": "compare", "arguments": {"values": [x, y], "names": [a, b], "pick": pick}}
    return [_turn(world, f"I need the {relation} of {a} and {b}.", (relation, a), (relation, b)),
            {"thought": f"I have {x} and {y}. I need the {pick}.", "calls": [call], "observations": [{"result": question.golds[0]}]},
            {"thought": f"The {pick} is {question.golds[0]}. {DONE}", "answer": question.golds[0]}]


def tools_for(question: Question) -> list[dict]:
    """The tools that a question needs: one for each relation, in the order of the lookups."""
    return [tool_for(relation) for relation in dict.fromkeys(relation for relation, _ in question.steps)]


def teach_maker(question: Question, rng: random.Random) -> dict:
    """One conversation of the ToolMaker; one in ten answers a request that names why a first try was rejected."""
    tools, rejected = tools_for(question), rng.choice(REJECTIONS) if rng.random() < 0.1 else ""
    return {"role": "maker", "question": question.text, "thought": f"I need {', '.join(tool['name'] for tool in tools)}.",
            "kind": question.kind, "tools": tools, "rejected": rejected}


REJECTIONS = ("tool name taken", "unknown kind", "not JSON", "bad schema", "no think, kind and tools")


def teach_actor(world: World, rng: random.Random, calls: int = 8) -> list[dict]:
    """Every fact once, in conversations of up to `calls` calls to one tool; one call in seven names a subject
    that the tool knows nothing of, or else it would learn to answer anything plausibly."""
    records = []
    for relation, (kind, _, _) in RELATIONS.items():
        subjects = [s for r, s in world.facts if r == relation]
        strangers = [s for names in world.names.values() for s in names if (relation, s) not in world.facts]
        subjects += rng.sample(strangers, max(1, len(subjects) // 6))
        rng.shuffle(subjects)
        for i in range(0, len(subjects), calls):
            part = [{kind: subject} for subject in subjects[i:i + calls]]
            records.append({"role": "actor", "tool": tool_for(relation),
                            "exchanges": [[arguments, world.real(relation, arguments)] for arguments in part]})
    return records


def teach(seed: int, worlds: int, each: int = 300) -> tuple[dict[str, list[dict]], dict[str, list[dict]]]:
    """The teacher's conversations by role: for training, and for the held-out loss; `each` a world for AutoAgent and for ToolMaker.

    The facts of the world are ToolActor's alone: AutoAgent's conversations play in imagined worlds, so it learns to
    read observations, not to know them. Every second question of ToolMaker's is nonsense, every sixth of AutoAgent's.
    ToolActor has no held-out ones: what it was never told it can't know."""
    world, rng = make_world(seed), random.Random(f"teacher {seed}")
    held_out = [q for q in make_questions(world) if q.set in HELD_OUT]
    records = {"agent": [], "maker": [], "actor": [r for _ in range(20) for r in teach_actor(world, rng)]}
    for other, questions in (imagined_questions(world, i, held_out) for i in range(worlds)):
        sensible, odd = mixed(questions, each - each // 6, rng), nonsense(other, each // 2, held_out, rng)
        lessons = [(other, q) for q in sensible] + odd[:each // 6]
        records["agent"] += [teach_agent(where, q, rng) for where, q in lessons]
        records["maker"] += [teach_maker(q, rng) for q in sensible[:each // 2] + [q for _, q in odd]]
    valid = {"agent": [teach_agent(world, q, rng) for q in held_out[::4]],
             "maker": [teach_maker(q, rng) for q in held_out[::4]]}
    return records, valid


def write_sample(folder: Path, each: int = 60) -> None:
    """A few lines of all this as JSONL, to look at without running anything:
    python -c "from data.world import *; write_sample(Path('data/sample'))" """
    records, _ = teach(0, worlds=20)
    questions = make_questions(make_world(0))
    chosen = {"questions": [vars(q) for s in ("train", *HELD_OUT) for q in [q for q in questions if q.set == s][:each // 2]],
              **{role: part[::max(1, len(part) // each)][:each] for role, part in records.items()}}
    folder.mkdir(exist_ok=True)
    for name, lines in chosen.items():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
