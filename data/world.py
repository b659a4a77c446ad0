"""A fictional world: its facts, its real tools, questions about it, and a teacher's conversations.
All names are invented, so no pretrained model knows the facts. The ToolActor learns the facts in
training. AutoAgent reads them from tool observations."""
import itertools
import math
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from data.schema import object_schema
from data.utilities import compare

# Numbers are strings, as in many web APIs. The miniature learns to copy a quoted digit as early as
# a name, but a bare digit much later.
RELATIONS = {  # relation: (kind of its subject, kind of its value, description of its tool)
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
    "currency": ("country", "currency", "The money that a country uses.")}
# Number of entities of each kind.
SIZES = {"person": 32, "company": 10, "city": 16, "country": 8, "language": 8, "currency": 8}
INFERENCE = {  # one word in the question stands for several lookups, listed in order
    "grandfather": ("father", "father"),
    "father-in-law": ("spouse", "father"),
    "boss": ("employer", "founder"),
    "native language": ("birthplace", "country", "language"),
    "home currency": ("birthplace", "country", "currency")}
# Each relation has its own word. With both words for both relations, some runs confuse the words.
COMPARED = {"score": "largest", "size": "smallest"}
HELD_OUT = ("hotpot", "musique", "2wiki", "bamboogle")  # each imitates the benchmark of that name
SILLY = {("country", "capital"), ("capital", "country")}  # never consecutive: one undoes the other


@dataclass(frozen=True)
class Question:
    """A question about a world. Only the scorer reads `golds`; no prompt contains them."""
    id: str
    text: str
    golds: list[str]               # accepted answers
    set: str                       # "train" or a name in HELD_OUT
    kind: str                      # "composition", "inference" or "comparison"
    steps: list[tuple[str, str]]   # (relation, subject) of each lookup, in order
    chain: tuple[str, ...]         # entities from start to answer; in a comparison, both, sorted


@dataclass
class World:
    """Entities and facts. The facts can be sealed while a model simulates the tools."""
    seed: int
    names: dict[str, list[str]]                              # {kind: entities}
    _facts: dict[tuple[str, str], str] = field(repr=False)   # {(relation, subject): value}
    _open: bool = True

    @property
    def facts(self) -> dict[tuple[str, str], str]:
        """Return {(relation, subject): value}. Raise PermissionError if the world is sealed."""
        if not self._open:
            raise PermissionError("the facts are sealed while a model simulates the tools")
        return self._facts

    @contextmanager
    def sealed(self):
        """Return a context manager that blocks access to the facts, so no rollout can use them."""
        was_open = self._open
        self._open = False
        try:
            yield
        finally:
            self._open = was_open

    def real(self, name: str, arguments: dict) -> dict:
        """Run a real tool: return {relation: value}, or an error if the fact is missing."""
        subject = next(iter(arguments.values()), None)
        known = name in RELATIONS and isinstance(subject, str) and (name, subject) in self.facts
        return {name: self.facts[name, subject]} if known else unknown(name)


def unknown(relation: str) -> dict:
    """Return the error that a real tool reports for a missing fact."""
    return {"error": f"no {relation} found"}


def make_world(seed: int) -> World:
    """Return the world of a seed. Equal seeds give equal worlds."""
    stream = _distinct_names(random.Random(f"names {seed}"))
    names = {kind: list(itertools.islice(stream, n)) for kind, n in SIZES.items()}
    return World(seed, names, _draw_facts(names, random.Random(f"facts {seed}")))


def imagine(world: World, number: int) -> World:
    """Return a world with the same names and other facts. It reveals no fact of the true world."""
    rng = random.Random(f"imagined {world.seed} {number}")
    return World(world.seed, world.names, _draw_facts(world.names, rng))


def _distinct_names(rng: random.Random) -> Iterator[str]:
    used = set()
    while True:
        syllables = [rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(2)]
        name = "".join(syllables).capitalize() + rng.choice(["", "n", "r", "s", "x", "l"])
        if name not in used:
            used.add(name)
            yield name


def _draw_value(names: dict[str, list[str]], kind: str, rng: random.Random) -> str:
    return str(rng.randrange(1, 10)) if kind == "number" else rng.choice(names[kind])


def _draw_facts(names: dict[str, list[str]], rng: random.Random) -> dict[tuple[str, str], str]:
    facts: dict[tuple[str, str], str] = {}
    # Four generations of eight people, eldest first. People 0 and 1, 2 and 3, ... are couples.
    people = rng.sample(names["person"], SIZES["person"])
    for i, person in enumerate(people):
        facts["birthplace", person] = rng.choice(names["city"])
        facts["home", person] = rng.choice(names["city"])
        facts["employer", person] = rng.choice(names["company"])
        facts["spouse", person] = people[i ^ 1]
        facts["score", person] = _draw_value(names, "number", rng)
        generation = i // 8
        if generation > 0:  # the first generation has no father and no teacher
            elders = people[(generation - 1) * 8:generation * 8]
            facts["father", person] = rng.choice(elders)
            facts["teacher", person] = rng.choice(elders)
    for company in names["company"]:
        facts["headquarters", company] = rng.choice(names["city"])
        facts["founder", company] = rng.choice(people)
        facts["size", company] = _draw_value(names, "number", rng)
    for i, city in enumerate(rng.sample(names["city"], SIZES["city"])):
        country = names["country"][i % SIZES["country"]]
        facts["country", city] = country
        facts["mayor", city] = rng.choice(people)
        if i < SIZES["country"]:  # the first city of each country is its capital
            facts["capital", country] = city
            facts["language", country] = rng.choice(names["language"])
            facts["currency", country] = rng.choice(names["currency"])
    return facts


def tool_for(relation: str) -> dict:
    """Return the tool definition that the ToolMaker should write for a relation."""
    subject, _, description = RELATIONS[relation]
    text = {"type": "string"}
    return {"name": relation, "description": description,
            "parameters": object_schema(**{subject: text}),
            "returns": object_schema(**{relation: text})}


def tools_for(question: Question) -> list[dict]:
    """Return one tool definition per relation of a question, in the order of the lookups."""
    relations = dict.fromkeys(relation for relation, _ in question.steps)
    return [tool_for(relation) for relation in relations]


# ---------------------------------------------------------------------------------------- questions


def make_questions(world: World, each: int = 50) -> list[Question]:
    """Return the training questions, then `each` questions for every held-out set.
    No training chain contains a held-out chain. No training path contains a bamboogle path."""
    rng = random.Random(f"questions {world.seed}")
    paths, unseen = _choose_paths(rng)
    pools = _make_pools(world, paths, rng)
    pools["unseen"] = _questions_along(world, unseen)
    for pool in pools.values():
        rng.shuffle(pool)
    recipes = {  # {set: {pool: number of questions}}, about the proportions of the benchmarks
        "hotpot": {"bridge": each - each // 5, "comparison": each // 5},
        "musique": {"bridge": each // 3, "three": each // 3, "four": each - each // 3 * 2},
        "2wiki": {"comparison": each // 4, "inference": each // 4, "bridge": each - each // 4 * 2},
        "bamboogle": {"unseen": each}}
    limit = max(1, each * len(recipes) // 25)  # at most 4 % share an answer
    answer_counts: Counter[str] = Counter()
    held_out: list[Question] = []
    for name, recipe in recipes.items():
        for pool_name, n in recipe.items():
            for q in _take(pools[pool_name], n, answer_counts, limit):
                held_out.append(replace(q, id=f"{name}-{q.kind}-{len(held_out)}", set=name))
    del pools["unseen"]
    return _training_questions(pools, held_out) + held_out


def _take(pool: list[Question], n: int, answer_counts: Counter, limit: int) -> list[Question]:
    """Move n questions out of a pool. Over all sets, an answer occurs at most `limit` times."""
    taken = []
    for question in list(pool):
        answer = question.golds[0]
        if len(taken) < n and answer_counts[answer] < limit:
            answer_counts[answer] += 1
            pool.remove(question)
            taken.append(question)
    return taken


def imagined_questions(world: World, number: int, held_out: list[Question]) -> tuple[World, list]:
    """Return an imagined world and its training questions, on the same paths as in the true world.
    No question repeats a held-out text or contains a held-out chain."""
    paths, _ = _choose_paths(random.Random(f"questions {world.seed}"))
    other = imagine(world, number)
    pools = _make_pools(other, paths, random.Random(f"imagined {world.seed} {number}"))
    return other, _training_questions(pools, held_out)


def _training_questions(pools: dict[str, list[Question]], held_out: list[Question]) -> list:
    texts = {q.text for q in held_out}
    chains = {q.chain for q in held_out}
    train: list[Question] = []
    for q in itertools.chain.from_iterable(pools.values()):
        if q.text not in texts and chains.isdisjoint(_parts(q.chain)):
            train.append(replace(q, id=f"train-{q.kind}-{len(train)}"))
    return train


def _parts(chain: tuple) -> list[tuple]:
    """Return all contiguous parts of a chain, including itself."""
    return [chain[i:j] for i, j in itertools.combinations(range(len(chain) + 1), 2)]


def nonsense(world: World, n: int, held_out: list[Question], rng: random.Random) -> list[tuple]:
    """Return n pairs (world, question) with random relations ("the size of the mayor of Tili").
    Each world holds only the facts of its question. Held-out paths and chains are excluded.
    Sensible questions teach which relation follows which; nonsense teaches to read the question."""
    _, unseen = _choose_paths(random.Random(f"questions {world.seed}"))
    texts = {q.text for q in held_out}
    chains = {q.chain for q in held_out}
    made = []
    while len(made) < n:
        path = tuple(rng.sample(list(RELATIONS), rng.randint(2, 4)))
        kinds = [RELATIONS[path[0]][0], *(RELATIONS[relation][1] for relation in path)]
        chain = tuple(_draw_value(world.names, kind, rng) for kind in kinds)
        question = _question(chain, path)
        has_unseen = path[:3] in unseen or path[1:] in unseen  # unseen: three relations
        has_held_out = question.text in texts or not chains.isdisjoint(_parts(chain))
        if not has_unseen and not has_held_out and len(set(chain)) == len(chain):
            facts = dict(zip(question.steps, chain[1:], strict=True))
            made.append((World(world.seed, world.names, facts), question))
    return made


def mixed(questions: list[Question], n: int, rng: random.Random) -> list[Question]:
    """Return up to n questions in random order, a seventh of each form, or all of a small form.
    Forms are compositions of 1 to 4 lookups, inferences, comparisons of scores and of sizes.
    Comparisons have two forms because they are hardest to learn."""
    forms: dict[tuple, list[Question]] = {}
    for q in questions:
        detail = {"composition": len(q.steps), "comparison": q.steps[0][0]}.get(q.kind)
        forms.setdefault((q.kind, detail), []).append(q)
    chosen = []
    for of_form in forms.values():
        chosen += rng.sample(of_form, min(len(of_form), math.ceil(n / len(forms))))
    return rng.sample(chosen, min(n, len(chosen)))


def _choose_paths(rng: random.Random) -> tuple[dict[str, list[tuple]], list[tuple]]:
    """Return {pool: paths}, and twelve unseen paths that no path in a pool contains. A path is a
    tuple of relations, in the order of the lookups. For example, ("founder", "birthplace") leads
    from a company to its founder, and from the founder to a city."""
    ones = [(relation,) for relation in RELATIONS]
    twos = _extend(ones)
    threes = [path for path in _extend(twos) if path not in INFERENCE.values()]
    rng.shuffle(threes)
    unseen = threes[:12]
    seen = threes[12:]
    fours = [path for path in _extend(seen) if path[1:] not in unseen]
    return {"one": ones, "bridge": twos, "three": seen, "four": fours}, unseen


def _extend(paths: list[tuple]) -> list[tuple]:
    """Return all extensions of the paths by one relation. No relation occurs twice in a path."""
    longer = []
    for path in paths:
        for relation, (subject, _, _) in RELATIONS.items():
            fits = subject == RELATIONS[path[-1]][1] and (path[-1], relation) not in SILLY
            if fits and relation not in path:
                longer.append((*path, relation))
    return longer


def _make_pools(world: World, paths: dict[str, list[tuple]], rng: random.Random) -> dict:
    """Return {pool: questions}. The pools one, bridge, three and four hold the compositions."""
    pools = {name: _questions_along(world, of_pool) for name, of_pool in paths.items()}
    pools["inference"] = []
    for word, path in INFERENCE.items():
        pools["inference"] += _questions_along(world, [path], word)
    pools["comparison"] = _comparisons(world, rng)
    return pools


def _questions_along(world: World, paths: list[tuple], word: str = "") -> list[Question]:
    """Return a question for each path and each start from which the path reaches an answer."""
    made = []
    for path in paths:
        chains = [_walk(world, start, path) for start in world.names[RELATIONS[path[0]][0]]]
        made += [_question(chain, path, word) for chain in chains if chain]
    return made


def _walk(world: World, start: str, path: tuple) -> tuple[str, ...] | None:
    """Return the entities along a path, or None if a fact is missing or an entity repeats.

    >>> _walk(make_world(0), "Sofes", ("founder", "birthplace"))
    ('Sofes', 'Zazus', 'Tili')
    """
    chain = (start,)
    for relation in path:
        if (relation, chain[-1]) not in world.facts:
            return None
        chain = (*chain, world.facts[relation, chain[-1]])
    return chain if len(set(chain)) == len(chain) else None


def _question(chain: tuple, path: tuple, word: str = "") -> Question:
    """Return the question for a chain. In an inference, `word` stands for the whole path."""
    kind = "inference" if word else "composition"
    who = "Who" if RELATIONS[path[-1]][1] == "person" else "What"
    text = f"{who} is the {word or ' of the '.join(reversed(path))} of {chain[0]}?"
    steps = list(zip(path, chain[:-1], strict=True))
    return Question("", text, [chain[-1]], "train", kind, steps, chain)


def _comparisons(world: World, rng: random.Random) -> list[Question]:
    """Return questions that compare the scores of two people or the sizes of two companies."""
    made = []
    for relation, pick in COMPARED.items():
        pairs = list(itertools.combinations(world.names[RELATIONS[relation][0]], 2))
        for pair in rng.sample(pairs, min(len(pairs), 400)):
            a, b = rng.sample(pair, 2)
            steps = [(relation, a), (relation, b)]
            x, y = [world.facts[step] for step in steps]
            if x != y:
                text = f"Of {a} and {b}, whose {relation} is {pick}?"
                gold = compare([a, b], [x, y], pick)["result"]
                chain = tuple(sorted(pair))
                made.append(Question("", text, [gold], "train", "comparison", steps, chain))
    return made


# ------------------------------------------------------------------------------------------ teacher
# The teacher's grammar is perfect; its strategy is flawed. SFT copies the flaws and GRPO unlearns
# them. Both lookups of a comparison share one turn, and the next thought repeats their results, so
# that the names and values to copy are near.
STOPS_SHORT = 0.7  # share of chains of two to four lookups that stop one short of the answer
REPEATS = 0.05     # share of lookup chains that repeat one lookup
GUESSES = 0.05     # share of traces that guess the answer without any lookup
REJECTED = 0.1     # share of ToolMaker prompts that report a rejected first reply
REJECTIONS = ("tool name taken", "unknown kind", "not JSON", "bad schema",
              "no think, kind and tools")  # messages of `Rejected`, word for word
DONE = "That was the last step."


def teach_agent(world: World, question: Question, rng: random.Random) -> dict:
    """Return one AutoAgent conversation by the teacher: perfect grammar, flawed strategy."""
    if rng.random() < GUESSES:
        gold = question.golds[0]
        kind = next((kind for kind, names in world.names.items() if gold in names), "number")
        turns = [{"thought": "I guess.", "answer": _draw_value(world.names, kind, rng)}]
    elif question.kind == "comparison":
        turns = _compare_turns(world, question)
    else:
        turns = _lookup_turns(world, question, rng)
    return {"role": "agent", "question": question.text, "kind": question.kind,
            "tools": tools_for(question), "turns": turns}


def _lookup_turns(world: World, question: Question, rng: random.Random) -> list[dict]:
    """Return one turn per lookup, then the turn that answers."""
    stops_short = len(question.steps) > 1 and rng.random() < STOPS_SHORT
    steps = question.steps[:-1] if stops_short else question.steps
    repeated = rng.randrange(len(steps)) if rng.random() < REPEATS else None
    turns = []
    known = ""  # a sentence with the last observation; the next thought begins with it
    for i, (relation, subject) in enumerate(steps):
        need = f"I need the {relation} of {subject}"
        turns.append(_turn(world, f"{known}{need}.", (relation, subject)))
        known = f"The {relation} of {subject} is {world.facts[relation, subject]}. "
        if i == repeated:
            turns.append(_turn(world, f"{known}{need} once more.", (relation, subject)))
    thought = known + ("That is close enough." if stops_short else DONE)
    return [*turns, {"thought": thought, "answer": world.facts[steps[-1]]}]


def _compare_turns(world: World, question: Question) -> list[dict]:
    """Return three turns: both lookups, a call to the utility tool `compare`, the answer."""
    (relation, a), (_, b) = question.steps
    x, y = [world.facts[step] for step in question.steps]
    pick = COMPARED[relation]
    gold = question.golds[0]
    call = {"name": "compare", "arguments": {"values": [x, y], "names": [a, b], "pick": pick}}
    return [_turn(world, f"I need the {relation} of {a} and {b}.", *question.steps),
            {"thought": f"The {relation} of {a} and {b} is {x} and {y}. I need the {pick}.",
             "calls": [call], "observations": [{"result": gold}]},
            {"thought": f"The {pick} is {gold}. {DONE}", "answer": gold}]


def _turn(world: World, thought: str, *steps: tuple[str, str]) -> dict:
    """Return a turn that makes the lookups `steps` and observes the results of the real tools."""
    calls = [{"name": r, "arguments": {RELATIONS[r][0]: subject}} for r, subject in steps]
    observations = [world.real(call["name"], call["arguments"]) for call in calls]
    return {"thought": thought, "calls": calls, "observations": observations}


def teach_maker(question: Question, rng: random.Random) -> dict:
    """Return one ToolMaker conversation. `rejected` is the error of a first reply, or ""."""
    tools = tools_for(question)
    thought = f"I need {', '.join(tool['name'] for tool in tools)}."
    rejected = rng.choice(REJECTIONS) if rng.random() < REJECTED else ""
    return {"role": "maker", "question": question.text, "thought": thought,
            "kind": question.kind, "tools": tools, "rejected": rejected}


def teach_actor(world: World, rng: random.Random, calls: int = 8) -> list[dict]:
    """Return ToolActor conversations with up to `calls` calls to one tool. Each fact occurs once.
    One call in seven asks for a missing fact, so that the ToolActor learns to return errors."""
    entities = list(itertools.chain.from_iterable(world.names.values()))
    records = []
    for relation, (kind, _, _) in RELATIONS.items():
        subjects = [name for known, name in world.facts if known == relation]
        strangers = [name for name in entities if (relation, name) not in world.facts]
        subjects += rng.sample(strangers, max(1, len(subjects) // 6))
        rng.shuffle(subjects)
        exchanges = [[{kind: name}, world.real(relation, {kind: name})] for name in subjects]
        for i in range(0, len(exchanges), calls):
            part = exchanges[i:i + calls]
            records.append({"role": "actor", "tool": tool_for(relation), "exchanges": part})
    return records


def teach(seed: int, worlds: int, each: int = 300) -> tuple[dict, dict]:
    """Return {role: conversations} for training and for validation, `each` per imagined world.
    Only the ToolActor trains on the true world: AutoAgent must read facts from observations."""
    world = make_world(seed)
    rng = random.Random(f"teacher {seed}")
    held_out = [q for q in make_questions(world) if q.set in HELD_OUT]
    records = {"agent": [], "maker": [], "actor": []}
    for _ in range(20):
        records["actor"] += teach_actor(world, rng)
    for number in range(worlds):
        other, questions = imagined_questions(world, number, held_out)
        sensible = mixed(questions, each - each // 6, rng)
        odd = nonsense(other, each // 2, held_out, rng)  # 1/2 of ToolMaker's, 1/6 of AutoAgent's
        lessons = [(other, q) for q in sensible] + odd[:each // 6]
        records["agent"] += [teach_agent(where, q, rng) for where, q in lessons]
        records["maker"] += [teach_maker(q, rng) for q in sensible[:each // 2]]
        records["maker"] += [teach_maker(q, rng) for _, q in odd]
    # The ToolActor has no validation set: it can't know a fact without training on it.
    valid = {"agent": [teach_agent(world, q, rng) for q in held_out[::4]],
             "maker": [teach_maker(q, rng) for q in held_out[::4]]}
    return records, valid
