"""Prompts that an assistant gets: every task below about topics of many kinds, written for this project."""

from __future__ import annotations

import random

# {} is a topic.
TASKS = (
    "Explain {} to a ten-year-old.",
    "What is {}?",
    "Write a short paragraph about {}.",
    "Give me five interesting facts about {}.",
    "What are the advantages and disadvantages of {}?",
    "Write a short story that involves {}.",
    "Write a poem about {}.",
    "How does {} work?",
    "What are common mistakes that beginners make with {}?",
    "Summarise the most important things to know about {}.",
    "Write a polite email to a colleague about {}.",
    "I know nothing about {}. Where should I start?",
    "List the steps that I need for a talk on {}.",
    "Compare {} today with {} a hundred years ago.",
    "Ask me three quiz questions about {} and give the answers.",
    "Write a dialogue between a teacher and a student about {}.",
    "Why is {} important?",
    "Write an introduction of an essay on {}.",
    "What would a day without {} look like?",
    "Suggest ten titles for a book about {}.",
    "Make a table with three columns that sums up {}.",
    "My friend says that {} is a waste of time. What can I answer?",
    "Describe {} in one sentence, then in a hundred words.",
    "What should I buy first if I want to get into {}?",
    "Who are the best-known people connected with {}?",
    "Write a product description for something that has to do with {}.",
    "What will {} look like in fifty years?",
    "Give me a checklist for {}.",
)
TOPICS = (
    "photosynthesis", "the French Revolution", "baking bread", "prime numbers", "recycling", "chess",
    "black holes", "the water cycle", "learning a language", "the human heart", "honey bees",
    "gardening", "public libraries", "electric cars", "the Roman Empire", "vaccines", "coffee",
    "running a marathon", "renewable energy", "the stock market", "jazz", "volcanoes", "gravity",
    "the printing press", "sleep", "budgeting", "climate change", "cats", "the Great Wall of China",
    "Python programming", "sorting algorithms", "plate tectonics", "watercolour painting",
    "job interviews", "machine learning", "the Moon", "yoga", "the Silk Road", "dinosaurs",
    "making cheese", "bicycles", "democracy", "DNA", "the piano", "camping", "time zones",
    "Shakespeare", "fractions", "coral reefs", "public speaking", "airplanes", "tea", "the internet",
    "whales", "ancient Egypt", "knitting", "football", "nuclear power", "antibiotics", "remote work",
    "the metric system", "poetry", "insects", "earthquakes", "photography", "board games",
    "healthy eating", "the Olympic Games", "glaciers", "computer viruses", "tides", "meditation",
    "robots", "the solar system", "folk tales", "databases", "trees in cities", "the immune system",
    "rice", "trains", "probability", "friendship", "hiking in the mountains", "maps", "chocolate",
    "rainbows", "bridges", "moving to another country", "the history of writing", "first aid", "dogs",
    "calculus", "owls", "inflation", "the theatre", "soap", "magnetism", "swimming", "ethics",
    "search engines", "deserts", "tomatoes", "museums", "the brain", "stress at work", "clocks",
    "rivers", "music festivals", "batteries", "origami", "the Renaissance", "ice cream", "satellites",
    "negotiation", "elephants", "credit cards", "weather forecasts", "pottery", "email", "space travel",
    "the Vikings", "cooking pasta", "glass", "ants",
)  # fmt: skip
SUMS = (
    "A train leaves at 3 pm and travels {a} km at {b} km/h. When does it arrive?",
    "What is {a} + {b}?",
    "What is {a} times {b}? Show how you get there.",
    "Anna has {a} apples and gives {b} of them away. How many are left?",
    "A shirt costs {a} euros and is reduced by {b} percent. What does it cost now?",
    "Write a Python function that returns the first {a} multiples of {b}.",
    "Write a function that checks whether a number is divisible by {a} and by {b}.",
    "Convert {a} degrees Celsius to Fahrenheit.",
    "How many minutes are {a} hours and {b} minutes?",
    "Explain step by step how to find the greatest common divisor of {a} and {b}.",
    "The sides of a rectangle are {a} cm and {b} cm. What are its area and its perimeter?",
    "Sort these numbers: {a}, {b}, 12, 7, 99.",
)


HELD_SHARE = 0.1  # share of topics, of sums and of prompts that come last, to be held out


def prompts(count: int, seed: int = 0) -> list[str]:
    """`count` different prompts, one sum in ten. The last tenth has topics and sums of its own.

    Raises ValueError when there are not so many.
    """
    order = random.Random(seed)
    topics, sums = order.sample(TOPICS, len(TOPICS)), order.sample(SUMS, len(SUMS))
    held = round(HELD_SHARE * count)
    topics_held, sums_held = round(HELD_SHARE * len(topics)), round(HELD_SHARE * len(sums))
    return [
        *_mixed(topics[topics_held:], sums[sums_held:], count - held, order),
        *_mixed(topics[:topics_held], sums[:sums_held], held, order),
    ]


def _mixed(topics: list[str], sums: list[str], count: int, order: random.Random) -> list[str]:
    tasks = {topic: order.sample(TASKS, len(TASKS)) for topic in topics}
    asked: list[str] = []
    for turn in range(len(TASKS)):
        for topic in topics:
            asked.append(tasks[topic][turn].replace("{}", topic))
            if len(asked) % 10 == 9:
                asked.append(order.choice(sums).format(a=order.randint(11, 99), b=order.randint(2, 30)))
    if count > len(asked):
        raise ValueError(f"there are only {len(asked)} of {count} prompts")
    return asked[:count]
