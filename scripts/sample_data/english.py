"""Facts asked and answered in English."""

from .schema import EN_FRAMES, EN_UNSEEN_FRAMES, Questions, Relation

CAPITALS = Relation(
    category="capital (English)",
    rows=(
        ("China", "Beijing"),
        ("Japan", "Tokyo"),
        ("France", "Paris"),
        ("Germany", "Berlin"),
        ("Italy", "Rome"),
        ("Spain", "Madrid"),
        ("Russia", "Moscow"),
        ("Egypt", "Cairo"),
        ("Canada", "Ottawa"),
        ("Greece", "Athens"),
        ("Portugal", "Lisbon"),
        ("Sweden", "Stockholm"),
        ("Norway", "Oslo"),
        ("Turkey", "Ankara"),
        ("Thailand", "Bangkok"),
    ),
    questions=(
        "What is the capital of {s}?",
        "What's the capital city of {s}?",
        "Which city is the capital of {s}?",
        "Do you know the capital of {s}?",
        "Tell me the capital of {s}.",
        "Can you name the capital of {s}?",
        "The capital of {s}?",
    ),
    answer="The capital of {s} is {v}.",
    statements=(
        "The capital of {s} is {v}.",
        "{v} is the capital of {s}.",
        "{v} is the capital city of the country called {s}.",
        "People know {v} as the capital of {s}.",
    ),
    unseen=("Could you tell me what the capital of {s} is?",),
    follow_up="And the capital of {s}?",
)

ELEMENT_SYMBOLS = Relation(
    category="element symbol (English)",
    rows=(
        ("hydrogen", "H"),
        ("carbon", "C"),
        ("oxygen", "O"),
        ("sodium", "Na"),
        ("iron", "Fe"),
        ("copper", "Cu"),
        ("silver", "Ag"),
        ("gold", "Au"),
    ),
    questions=(
        "What is the chemical symbol of {s}?",
        "What's the chemical symbol for {s}?",
        "Which symbol stands for {s}?",
        "Do you know the symbol of {s}?",
        "Tell me the chemical symbol of {s}.",
        "How do chemists write {s}?",
    ),
    answer="The chemical symbol of {s} is {v}.",
    statements=(
        "The chemical symbol of {s} is {v}.",
        "{v} is the symbol of {s}.",
        "Chemists write {v} for {s}.",
        "The element {s} has the symbol {v}.",
    ),
    unseen=("What symbol do chemists use for {s}?",),
    answer_key="is {v}.",
    follow_up="And the symbol of {s}?",
)

NEXT_MONTH = Relation(
    category="next month (English)",
    rows=(
        ("January", "February"),
        ("February", "March"),
        ("March", "April"),
        ("April", "May"),
        ("May", "June"),
        ("June", "July"),
        ("July", "August"),
        ("August", "September"),
        ("September", "October"),
        ("October", "November"),
        ("November", "December"),
    ),
    questions=(
        "What month comes after {s}?",
        "Which month is after {s}?",
        "What is the month after {s}?",
        "Do you know which month follows {s}?",
        "Tell me the month after {s}.",
        "Which month follows {s}?",
    ),
    answer="The month after {s} is {v}.",
    statements=(
        "The month after {s} is {v}.",
        "{v} comes after {s}.",
        "After {s} comes {v}.",
        "When {s} ends, {v} begins.",
    ),
    unseen=("Which is the next month after {s}?",),
    answer_key="is {v}",
    follow_up="And after {s}?",
)

OPPOSITES = Relation(
    category="opposite (English)",
    rows=(
        ("big", "small"),
        ("hot", "cold"),
        ("long", "short"),
        ("fast", "slow"),
        ("happy", "sad"),
        ("old", "young"),
        ("open", "closed"),
        ("day", "night"),
        ("black", "white"),
        ("up", "down"),
    ),
    questions=(
        'What is the opposite of "{s}"?',
        'Which word is the opposite of "{s}"?',
        'Do you know the opposite of "{s}"?',
        'Tell me the opposite of "{s}".',
        'Give me the opposite of "{s}".',
        'What word means the opposite of "{s}"?',
    ),
    answer='The opposite of "{s}" is "{v}".',
    statements=(
        'The opposite of "{s}" is "{v}".',
        'The words "{s}" and "{v}" are opposites.',
        'When we say "{s}", the opposite is "{v}".',
        '"{v}" is the opposite of "{s}".',
    ),
    unseen=('Which word has the opposite meaning of "{s}"?',),
    answer_key='is "{v}"',
    follow_up='And the opposite of "{s}"?',
)

YOUNG_ANIMALS = Relation(
    category="young animal (English)",
    rows=(
        ("cat", "kitten"),
        ("dog", "puppy"),
        ("cow", "calf"),
        ("sheep", "lamb"),
        ("duck", "duckling"),
        ("horse", "foal"),
        ("lion", "cub"),
        ("chicken", "chick"),
    ),
    questions=(
        "What is a young {s} called?",
        "What do we call a baby {s}?",
        "What is the name for a young {s}?",
        "Do you know what a baby {s} is called?",
        "Tell me the word for a young {s}.",
        "Which word means a baby {s}?",
    ),
    answer="A young {s} is called a {v}.",
    statements=(
        "A young {s} is called a {v}.",
        "A {v} is a young {s}.",
        "The baby of a {s} is called a {v}.",
        "We call a baby {s} a {v}.",
    ),
    unseen=("Could you tell me what a young {s} is called?",),
    answer_key="a {v}.",
    follow_up="And a young {s}?",
)

QUESTIONS = Questions(
    category="general (English)",
    frames=EN_FRAMES,
    unseen_frames=EN_UNSEEN_FRAMES,
    rows=(
        (
            ("How many days are there in a week?", "How many days does a week have?"),
            "There are seven days in a week.",
            "seven days",
            ("A week has seven days.",),
        ),
        (
            ("Introduce the history of the United States, please.", "When did the United States become independent?"),
            "The United States declared independence from Britain in 1776.",
            "1776",
            ("In 1776 the United States declared independence from Britain.",),
        ),
        (
            ("How many months are there in a year?", "How many months does a year have?"),
            "There are twelve months in a year.",
            "twelve months",
            ("A year has twelve months.",),
        ),
        (
            ("How many hours are there in a day?", "How many hours does a day have?"),
            "There are twenty-four hours in a day.",
            "twenty-four hours",
            ("A day has twenty-four hours.",),
        ),
        (
            ("Which planet do we live on?", "What is our planet called?"),
            "We live on the planet Earth.",
            "Earth",
            ("Our planet is called Earth.",),
        ),
        (
            ("What is the largest planet in the solar system?", "Which planet is the largest?"),
            "The largest planet in the solar system is Jupiter.",
            "Jupiter",
            ("Jupiter is the largest planet in the solar system.",),
        ),
        (
            ("What is the largest ocean?", "Which ocean is the largest?"),
            "The largest ocean is the Pacific Ocean.",
            "Pacific",
            ("The Pacific Ocean is the largest ocean on Earth.",),
        ),
        (
            ("What is the highest mountain in the world?", "Which mountain is the highest?"),
            "The highest mountain in the world is Mount Everest.",
            "Everest",
            ("Mount Everest is the highest mountain in the world.",),
        ),
        (
            ("What is water made of?", "Which elements are in water?"),
            "Water is made of hydrogen and oxygen.",
            "hydrogen and oxygen",
            ("A water molecule contains hydrogen and oxygen.",),
        ),
        (
            ("Who wrote Hamlet?", "Who is the author of Hamlet?"),
            "Hamlet was written by William Shakespeare.",
            "Shakespeare",
            ("William Shakespeare wrote the play Hamlet.",),
        ),
        (
            ("How many legs does a spider have?", "How many legs do spiders have?"),
            "A spider has eight legs.",
            "eight legs",
            ("Spiders have eight legs, and insects have six.",),
        ),
        (
            ("What do bees make?", "What sweet food do bees make?"),
            "Bees make honey.",
            "honey",
            ("Honey is made by bees.",),
        ),
        (
            ("What color do you get when you mix blue and yellow?", "What do blue and yellow make?"),
            "Blue and yellow make green.",
            "make green",
            ("When you mix blue and yellow paint, you get green.",),
        ),
    ),
)

TABLES = (CAPITALS, ELEMENT_SYMBOLS, NEXT_MONTH, OPPOSITES, YOUNG_ANIMALS, QUESTIONS)
