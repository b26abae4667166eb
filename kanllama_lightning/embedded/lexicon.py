"""The words of the embedded world: what there is, and what is true of it."""

from typing import NamedTuple

GIRLS = ("Anna", "Clara", "Emma", "Grace", "Ida", "Julia", "Lily", "Nora", "Rosa", "Sara", "Vera")
BOYS = ("Adam", "Ben", "David", "Felix", "Henry", "Jack", "Leo", "Max", "Oscar", "Sam", "Tom")
WOMEN = ("mother", "grandmother", "aunt", "sister")
MEN = ("father", "grandfather", "uncle", "brother")
WORKERS = ("teacher", "farmer", "baker", "doctor", "gardener")
PET_NAMES = ("Rex", "Bella", "Coco", "Daisy", "Lucky", "Pip")


class Animal(NamedTuple):
    """What is true of every animal of one kind."""

    sound: str
    """Verb for its call."""
    says: str
    """The call itself."""
    food: str
    size: int
    """Rank from small to large, unique, so that any two kinds can be compared."""
    can: str
    cannot: str


ANIMALS = {
    "mouse": Animal("squeak", "squeak", "cheese", 0, "run", "fly"),
    "frog": Animal("croak", "ribbit", "worms", 1, "jump", "sing"),
    "hen": Animal("cluck", "cluck", "corn", 2, "walk", "swim"),
    "duck": Animal("quack", "quack", "bread", 3, "swim", "read"),
    "cat": Animal("meow", "meow", "fish", 4, "climb", "sing"),
    "fox": Animal("howl", "yip", "meat", 5, "run", "fly"),
    "dog": Animal("bark", "woof", "meat", 6, "run", "read"),
    "goat": Animal("bleat", "meh", "leaves", 7, "climb", "swim"),
    "sheep": Animal("bleat", "baa", "grass", 8, "walk", "dance"),
    "pig": Animal("grunt", "oink", "corn", 9, "walk", "fly"),
    "cow": Animal("moo", "moo", "grass", 10, "walk", "climb"),
    "horse": Animal("neigh", "neigh", "hay", 11, "run", "climb"),
    "rabbit": Animal("sniff", "sniff", "carrots", 12, "jump", "sing"),
    "parrot": Animal("squawk", "squawk", "seeds", 13, "fly", "swim"),
}
PETS = ("dog", "cat", "rabbit", "parrot")
SIZED = tuple(a for a in ANIMALS if a not in ("rabbit", "parrot"))
"""The animals that are compared by size, small to large."""


class Thing(NamedTuple):
    """What is true of every object of one kind."""

    falls: str
    """What it does when it falls, a key of `FALLS`."""
    material: str | None = None
    """Adjective for what it may be made of."""


FALLS = ("break", "bounce", "clink", "roll away", "float down", "land softly")

THINGS = {
    "glass": Thing("break"),
    "cup": Thing("break", "clay"),
    "plate": Thing("break", "clay"),
    "bowl": Thing("break", "clay"),
    "vase": Thing("break", "clay"),
    "mirror": Thing("break"),
    "jar": Thing("break"),
    "lamp": Thing("break"),
    "bottle": Thing("break"),
    "ball": Thing("bounce", "rubber"),
    "balloon": Thing("bounce"),
    "coin": Thing("clink", "silver"),
    "key": Thing("clink", "silver"),
    "spoon": Thing("clink", "silver"),
    "bell": Thing("clink", "golden"),
    "marble": Thing("roll away"),
    "pencil": Thing("roll away", "wooden"),
    "wheel": Thing("roll away", "wooden"),
    "feather": Thing("float down"),
    "letter": Thing("float down"),
    "map": Thing("float down", "paper"),
    "pillow": Thing("land softly"),
    "blanket": Thing("land softly", "woollen"),
    "doll": Thing("land softly", "woollen"),
    "scarf": Thing("land softly", "woollen"),
    "hat": Thing("land softly", "woollen"),
}
FRAGILE = tuple(n for n, t in THINGS.items() if t.falls == "break")
STURDY = tuple(n for n, t in THINGS.items() if t.falls != "break")
TOYS = ("ball", "balloon", "marble", "doll", "bell")
LOST = ("ball", "key", "coin", "hat", "scarf", "doll", "map", "letter", "marble", "pencil")
SURFACES = ("table", "shelf", "chair", "desk")
LEDGES = ("table", "bench", "wall", "fence")
"""What things fall off outdoors."""
FURNITURE = ("bed", "door", "sofa", "stove", "box", "basket", "bag", "carpet")

FOODS = ("apple", "pear", "plum", "cherry", "egg", "cake", "cookie", "sandwich", "banana", "tomato")
FODDER = ("cheese", "worms", "corn", "bread", "fish", "meat", "leaves", "grass", "hay", "carrots",
          "seeds")  # fmt: skip
DRINKS = ("milk", "water", "juice", "tea")
DISHES = ("soup", "rice", "beans", "porridge")

COLOURS = ("red", "blue", "green", "yellow", "white", "black", "brown", "pink")
MIXES = {"red and blue": "purple", "blue and yellow": "green", "red and yellow": "orange",
         "black and white": "gray", "red and white": "pink"}  # fmt: skip
SIZES = ("big", "small", "tiny")
AGES = ("old", "new")
MATERIALS = ("clay", "rubber", "silver", "golden", "wooden", "paper", "woollen")
CHARACTERS = ("kind", "brave", "clever", "funny", "quiet", "young")


class Place(NamedTuple):
    """Where a story may be."""

    to: str
    at: str
    outside: bool
    animals: tuple[str, ...]
    """Animals that live there."""


PLACES = {
    "kitchen": Place("to the kitchen", "in the kitchen", False, ("cat", "mouse")),
    "bedroom": Place("to the bedroom", "in the bedroom", False, ("cat", "dog")),
    "school": Place("to school", "at school", False, ("mouse",)),
    "library": Place("to the library", "in the library", False, ("cat", "mouse")),
    "shop": Place("to the shop", "in the shop", False, ("cat",)),
    "barn": Place("to the barn", "in the barn", False, ("horse", "cow", "pig", "sheep")),
    "attic": Place("to the attic", "in the attic", False, ("mouse", "cat")),
    "garden": Place("to the garden", "in the garden", True, ("cat", "rabbit", "frog", "hen")),
    "park": Place("to the park", "in the park", True, ("dog", "duck", "rabbit")),
    "forest": Place("to the forest", "in the forest", True, ("fox", "rabbit", "mouse")),
    "beach": Place("to the beach", "on the beach", True, ("dog", "horse")),
    "river": Place("to the river", "by the river", True, ("duck", "frog", "cow")),
    "lake": Place("to the lake", "by the lake", True, ("duck", "frog")),
    "farm": Place("to the farm", "on the farm", True, ("cow", "pig", "sheep", "horse", "goat")),
    "field": Place("to the field", "in the field", True, ("sheep", "horse", "rabbit", "goat")),
    "market": Place("to the market", "at the market", True, ("hen", "dog", "pig")),
    "hill": Place("to the hill", "on the hill", True, ("goat", "sheep", "fox")),
}
OUTDOORS = tuple(p for p, x in PLACES.items() if x.outside)
INDOORS = tuple(p for p, x in PLACES.items() if not x.outside)

WEATHER = {  # kind: its adjective
    "rain": "rainy", "snow": "snowy", "sun": "sunny", "wind": "windy", "fog": "foggy",
    "storm": "stormy",
}  # fmt: skip
SEASONS = {  # season: the weather it brings
    "spring": ("rain", "sun", "wind"),
    "summer": ("sun", "rain", "storm"),
    "autumn": ("fog", "rain", "wind", "storm"),
    "winter": ("snow", "fog", "wind"),
}
DAYTIMES = ("morning", "afternoon", "evening")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

GOOD = ("happy", "proud", "glad", "calm")
BAD = ("sad", "angry", "afraid", "lonely", "bored", "worried", "tired", "hungry", "thirsty",
       "cold", "hot", "ill", "sorry")  # fmt: skip
FEELINGS = GOOD + BAD

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
SPOTS = ("under the bed", "behind the door", "in the box", "behind the sofa", "under the stairs",
         "under the carpet")  # fmt: skip
HAUNTS = ("behind the tree", "in the grass", "under the bench", "behind the wall",
          "behind the fence", "near the gate")  # fmt: skip
"""Where things and children hide outdoors."""
