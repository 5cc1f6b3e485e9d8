"""A shop: a catalogue in memory, pages from templates, a search, reports; and, to be driven from outside, programs."""
import random
import subprocess

from flask import Flask, render_template_string, request

app = Flask(__name__)
rng = random.Random(7)
WORDS = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 9))) for _ in range(4000)]
ITEMS = [
    {
        "number": n,
        "name": " ".join(rng.choices(WORDS, k=3)),
        "text": " ".join(rng.choices(WORDS, k=40)),
        "price": rng.randint(100, 99999),
        "group": rng.randint(0, 99),
    }
    for n in range(12000)
]
GROUPS = {}
INDEX = {}
for item in ITEMS:
    GROUPS.setdefault(item["group"], []).append(item)
    for word in set(item["text"].split()):
        INDEX.setdefault(word, []).append(item["number"])

PAGE = """<html><title>{{ item.name }}</title><h1>{{ item.name|title }}</h1><p>{{ item.text }}</p>
<b>{{ "%.2f"|format(item.price / 100) }}</b><ul>{% for other in others %}
<li><a href="/item/{{ other.number }}">{{ other.name }}</a> {{ other.text|truncate(40) }}</li>{% endfor %}</ul></html>"""
LIST = """<html><title>{{ title }}</title><ol>{% for item in items %}<li>{{ item.name }}: {{ item.price }}</li>
{% endfor %}</ol></html>"""


@app.get("/")
def home():
    return "open"


@app.get("/item/<int:number>")
def show(number):
    item = ITEMS[number % len(ITEMS)]
    group = GROUPS[item["group"]]
    at = number % max(1, len(group) - 8)
    return render_template_string(PAGE, item=item, others=group[at : at + 8])


@app.get("/search")
def search():
    found = INDEX.get(WORDS[int(request.args["word"]) % len(WORDS)], [])
    items = sorted((ITEMS[n] for n in found), key=lambda item: item["price"])[:20]
    return render_template_string(LIST, title="search", items=items)


@app.get("/report/<int:group>")
def report(group):
    items = GROUPS[group % 100]
    dear = sorted(items, key=lambda item: (-item["price"], item["name"]))[:10]
    mean = sum(item["price"] for item in items) / len(items)
    return render_template_string(LIST, title=f"{mean:.2f}", items=dear)


@app.get("/run/<program>/<int:seed>")
def run(program, seed):
    done = subprocess.run(["/srv/programs.sh", program, str(seed)], capture_output=True, text=True, check=True)
    return done.stdout
