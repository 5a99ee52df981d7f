"""Short reviews for the built-in pair: openings, requests to the source model, cleaning, balancing. Standard library.

A review is an opening ("The hotel room was") and a continuation of one or two sentences that ends with a full stop. The
openings are neutral to VADER, so that the sentiment of a review is the sentiment of its continuation.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

# Topics, templates and aspects of one kind of thing. {t} is the topic; every opening ends with a word after which a
# space begins a new token, so the tokens of an opening are a prefix of the tokens of the whole review.
KINDS: dict[str, tuple[str, str, str]] = {
    "product": (
        "blender,phone,laptop,vacuum,coffee maker,toaster,kettle,lamp,backpack,jacket,pair of shoes,desk,chair,"
        "mattress,pillow,tent,bicycle,camera,printer,keyboard,monitor,speaker,watch,razor,hair dryer,"
        "projector,heater,suitcase,"
        "umbrella,rug,sofa,bookshelf,frying pan,knife set,water bottle,lunch box,grill,lawn mower,drill,ladder,tablet,"
        "television,router,phone case,charger,pair of headphones,microwave,washing machine,fridge,sewing machine",
        "I bought this {t} and|I bought a {t} last month and|The {t} arrived on Monday and|After two weeks, the {t}|"
        "My new {t} is|This {t} was|We use the {t} every day and|When I opened the box, the {t}|"
        "I gave this {t} to my sister and|"
        "For the price, this {t} is|The design of this {t} is|My husband says the {t} is|"
        "I have had this {t} for a year and|"
        "The first time I used the {t}, it|The instructions for the {t} were",
        "price,size,noise,weight,colour,delivery,buttons,battery,build,instructions,company",
    ),
    "place": (
        "hotel,hostel,guest house,campsite,museum,art gallery,zoo,aquarium,park,beach,castle,swimming pool,gym,library,"
        "cinema,theatre,shopping mall,market,train station,airport,farm,garden,spa,ski resort,water park,bookshop,"
        "furniture store,clothes shop,supermarket,golf course,hiking trail,apartment",
        "We visited the {t} and|We went to the {t} on Sunday and|The staff at the {t} were|The {t} was|"
        "I spent a day at the {t} and|"
        "Our visit to the {t} was|When we arrived, the {t} was|The entrance of the {t} was|The people at the {t} were|"
        "My family went to the {t} and|I go to this {t} every week and|The price of the {t} was|"
        "It was our first time at the {t} and|"
        "The area around the {t} is",
        "staff,price,crowd,parking,cleaning,view,noise,opening hours,location,toilets,cafe",
    ),
    "food": (
        "restaurant,cafe,bakery,pizza place,burger bar,noodle shop,sushi bar,steak house,diner,food truck,tea room,"
        "sandwich shop,curry house,fish restaurant,taco stand,ice cream shop,breakfast place,buffet,bistro,pub",
        "We had dinner at the {t} and|The food at the {t} was|The waiter at the {t} was|"
        "I ordered the soup at the {t} and|"
        "Our table at the {t} was|We went to the {t} and|The menu of the {t} is|The {t} was|"
        "I took my parents to the {t} and|"
        "The service at the {t} was|The coffee at the {t} is|We waited at the {t} and|Lunch at this {t} was|"
        "The bill at the {t} was",
        "service,price,taste,portions,noise,waiting,menu,drinks,dessert,tables,bread",
    ),
    "media": (
        "film,movie,book,cookbook,drama,documentary,musical,series,cartoon,album,podcast,video game,board game,western,"
        "biography,history book,travel guide,poetry book,mystery book,science book",
        "I saw this {t} and|The story of this {t} is|This {t} was|The first part of the {t} is|The end of the {t} was|"
        "We got this {t} last week and|My sister told me about this {t} and|The people who made this {t}|"
        "I finished the {t} and|"
        "The main idea of the {t} is|After an hour, the {t}|The music in this {t} is|My kids say this {t} is",
        "story,characters,length,ending,music,pace,style,beginning,pictures,price",
    ),
    "service": (
        "plumber,electrician,dentist,doctor,barber,hairdresser,taxi driver,car mechanic,bank,airline,phone company,"
        "internet provider,moving company,cleaning service,delivery service,travel agency,language school,"
        "driving school,"
        "dance class,cooking class,yoga class,piano teacher,insurance company,photographer,gardener,painter,tour guide,"
        "bus company,ferry,night train",
        "I called the {t} and|The {t} was|We used this {t} and|Our {t} was|I booked the {t} online and|"
        "The {t} we found is|"
        "My neighbour told me about the {t} and|My experience with the {t} was|The {t} said that|"
        "The price of the {t} is|"
        "I have used this {t} twice and|When we asked the {t} about the price, they",
        "price,time,manners,waiting,phone calls,results,cleaning,advice,booking,refund",
    ),
    "event": (
        "concert,wedding,conference,flea market,food market,book launch,football match,basketball game,opera,"
        "magic show,"
        "puppet show,boat trip,city tour,cooking workshop,art class,school trip,parade,exhibition,quiz night,bus tour",
        "We went to the {t} and|The {t} was|The tickets for the {t} were|Our seats at the {t} were|The {t} started and|"
        "The crowd at the {t} was|I took my son to the {t} and|The second half of the {t} was|After the {t}, we|"
        "The people who ran the {t} were|The {t} on Saturday was",
        "seats,sound,tickets,crowd,length,weather,staff,price,food,time",
    ),
}

# Shots that show the source model the length and the tone; written for this script. A 135M model asked for a bad review
# without shots tends to write a kind one.
SHOTS: dict[str, tuple[tuple[str, str], ...]] = {
    "very bad": (
        ("a lawn chair", "The lawn chair broke on the first day. It is a waste of money and I hate it."),
        ("a bus trip", "The bus was dirty and the driver was rude. It was a horrible day for all of us."),
        (
            "a story book",
            "I read this story book on the train and it was awful. The plot is stupid and the jokes are bad.",
        ),
        ("a soup kitchen", "The soup was cold and tasted terrible. We were angry and left early."),
    ),
    "bad": (
        ("a clock", "The clock stopped after a week. Nobody at the company answered my emails."),
        ("a boat ride", "We waited two hours for the boat and the seats were wet. I was disappointed."),
        ("a radio show", "The radio show was too long and the host was boring. I turned it off."),
        ("a hat", "The hat was too small and the colour was wrong. I sent it back the next day."),
    ),
    "mixed": (
        ("a clock", "The clock looks nice, but it is loud at night. For the price it does the job."),
        ("a boat ride", "The view was pretty, but the seats were hard. We would not pay for it twice."),
        (
            "a story book",
            "I read this story book on the train and it was fine. The start is slow, but the last part is fun.",
        ),
    ),
    "plain": (
        ("a hat", "The hat is made of wool and comes in two colours. I wear it when I walk the dog."),
        (
            "a boat ride",
            "The boat left at noon and stopped at three towns. We sat near the back and looked at the water.",
        ),
        ("a radio show", "The radio show is on every Friday. The host talks about trains and reads letters."),
    ),
    "good": (
        ("a hat", "The hat is warm and looks lovely. I wear it every day and my friends love it."),
        ("a bus trip", "The bus was clean and the driver was friendly. We arrived early and had a great time."),
        ("a story book", "I read this story book on the train and it made me laugh. I would give it to any child."),
    ),
}
# Share of the requests per tone. The source leans to praise (a 'mixed' review is a kind one), so no tone may be left to
# the others; `balance` settles the rest.
TONES = {"very bad": 0.22, "bad": 0.20, "mixed": 0.18, "plain": 0.17, "good": 0.23}

# VADER compound: bin edges and the share of each bin in the training text: a mean of about 0.1 and room on both sides.
BIN_EDGES = (-0.6, -0.2, 0.2, 0.6)
BIN_SHARES = (0.16, 0.18, 0.18, 0.22, 0.26)

ALLOWED = re.compile(r"^ [A-Za-z][A-Za-z ,.'!?-]*$")
SENTENCE_END = re.compile(r"[.!?](?= |$)")
WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")
# Words by which the source speaks of its task, or as the seller, instead of writing the review.
OFF_TOPIC = {
    "review",
    "reviews",
    "reviewed",
    "reviewer",
    "sentence",
    "sentences",
    "ai",
    "assistant",
    "language",
    "model",
}
OFF_TOPIC |= {"english", "write", "feedback", "rating", "paragraph", "customers"}
MAX_WORDS = 34  # about 40 tokens, so that 48 new tokens hold every continuation
MIN_NEW_WORDS = 4


@dataclass(frozen=True, kw_only=True)
class Opening:
    """An opening, the thing it is about (with its article) and the aspects that a request may name."""

    text: str
    topic: str
    aspects: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Review:
    """`opening` + `continuation` is the review (the continuation begins with its space); `vader` is in -1 to 1."""

    opening: str
    continuation: str
    vader: float


def openings() -> list[Opening]:
    """Every opening, in a fixed order."""
    found = []
    for topics, templates, aspects in KINDS.values():
        for topic in topics.split(","):
            article = "an" if topic[0] in "aeiou" else "a"
            for template in templates.split("|"):
                text = template.format(t=topic).replace(f" a {topic}", f" {article} {topic}")
                found.append(Opening(text=text, topic=f"{article} {topic}", aspects=tuple(aspects.split(","))))
    return found


def request(opening: Opening, rng: random.Random) -> list[dict[str, str]]:
    """Chat messages that ask for a review of the opening's topic in a random tone, after two shots of that tone."""
    tone = rng.choices(list(TONES), weights=list(TONES.values()))[0]

    def ask(topic: str) -> str:
        return f"Write a {tone} review of {topic} in two short, simple sentences."

    messages = [{"role": "system", "content": "You write short reviews in plain, simple English."}]
    for topic, text in rng.sample(SHOTS[tone], 2):
        messages += [{"role": "user", "content": ask(topic)}, {"role": "assistant", "content": text}]
    # Half of the requests name an aspect: more kinds of text, at the price of a less fluent one.
    aspect = f" Talk about the {rng.choice(opening.aspects)}." if rng.random() < 0.5 else ""
    return [*messages, {"role": "user", "content": ask(opening.topic) + aspect}]


def words(text: str) -> list[str]:
    """Lower-case words, apostrophes kept inside."""
    return WORD.findall(text.lower())


def clean(opening: str, raw: str) -> str | None:
    """The first one or two whole sentences of `raw`, or None when the text is not fit to learn from."""
    line = raw.split("\n", 1)[0].rstrip()
    ends = [match.end() for match in SENTENCE_END.finditer(line)][:2]
    while ends and len(words(opening + line[: ends[-1]])) > MAX_WORDS:
        ends.pop()
    if not ends:
        return None
    kept = line[: ends[-1]]
    new = words(kept)
    whole = words(opening + kept)
    if len(new) < MIN_NEW_WORDS or not ALLOWED.match(kept) or "  " in kept or ".." in kept:
        return None
    if OFF_TOPIC.intersection(new) or any(a == b for a, b in pairwise(whole)):
        return None
    grams = list(zip(whole, whole[1:], whole[2:], strict=False))
    return kept if len(set(grams)) == len(grams) else None


def drop_rare(reviews: list[Review], least: int) -> list[Review]:
    """Only the reviews whose every word occurs in at least `least` of them: a small vocabulary can be learnt."""
    counts = Counter(word for review in reviews for word in set(words(review.opening + review.continuation)))
    return [r for r in reviews if all(counts[word] >= least for word in words(r.opening + r.continuation))]


def vader_bin(compound: float) -> int:
    """0 (very negative) to 4 (very positive); an edge belongs to the bin above it."""
    return sum(compound >= edge for edge in BIN_EDGES)


def balance(reviews: list[Review], rng: random.Random) -> list[Review]:
    """The largest random subset, without repeats, whose bins have the shares `BIN_SHARES`; order is random.

    Raises ValueError when a bin is empty: no subset has the shares then.
    """
    bins: list[list[Review]] = [[] for _ in BIN_SHARES]
    for review in reviews:
        bins[vader_bin(review.vader)].append(review)
    if not all(bins):
        raise ValueError(f"reviews per VADER bin are {[len(b) for b in bins]}: sample more text (--sample-seconds)")
    total = min(len(members) / share for members, share in zip(bins, BIN_SHARES, strict=True))
    kept = [r for b, share in zip(bins, BIN_SHARES, strict=True) for r in rng.sample(b, int(total * share + 1e-9))]
    rng.shuffle(kept)
    return kept


def cut_short(review: Review, rng: random.Random) -> str:
    """The continuation cut after a random word (at least three are kept): what a response limit leaves."""
    pieces = review.continuation.split(" ")  # pieces[0] is empty: the continuation begins with a space
    return " ".join(pieces[: rng.randint(min(4, len(pieces)), len(pieces))]).rstrip(".!?")


def disjoint_pairs(reviews: list[Review], least_gap: float, rng: random.Random) -> list[tuple[Review, Review]]:
    """Pairs (better, worse) of the same opening, each review in at most one pair, |difference| >= `least_gap`.

    Pairs are drawn first and filtered after, so they follow the natural distribution apart from the near ties.
    """
    groups: dict[str, list[Review]] = {}
    for review in reviews:
        groups.setdefault(review.opening, []).append(review)
    pairs = []
    for members in groups.values():
        rng.shuffle(members)
        for a, b in zip(members[::2], members[1::2], strict=False):
            if abs(a.vader - b.vader) >= least_gap:
                pairs.append((a, b) if a.vader > b.vader else (b, a))
    return pairs
