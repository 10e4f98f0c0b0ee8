"""Write data/terminal.jsonl: 5,000 questions about the command line, each answer computed.

Run it with `python data/terminal.py`.
"""

import ipaddress
import json
import random
import stat
from pathlib import Path

DAYS = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"]
MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
]
MONTHS += ["November", "December"]
UNITS = ["bytes", "KiB", "MiB", "GiB", "TiB"]


def rights(digit):
    """What an octal digit allows, in words."""
    allowed = [word for bit, word in ((4, "read"), (2, "write"), (1, "execute")) if digit & bit]
    return (
        " and ".join([", ".join(allowed[:-1]), allowed[-1]] if len(allowed) > 1 else allowed)
        or "do nothing"
    )


def sentence(mode):
    """What the three digits of a mode allow to whom."""
    owner, group, others = mode >> 6, mode >> 3 & 7, mode & 7
    return (
        f"The owner may {rights(owner)}, the group may {rights(group)}, and others may "
        f"{rights(others)}."
    )


def chmod(draw):
    """A question about a file's mode, and its answer."""
    mode = draw.randrange(0o1000)
    letters = stat.filemode(mode)[1:]
    name = draw.choice(
        ["notes.txt", "backup.sh", "report.pdf", "deploy.sh", "photo.jpg", "index.html", "run.py"]
    )
    return draw.choice(
        [
            (
                f"What does chmod {mode:03o} {name} do?",
                f"It sets the mode to {letters}. {sentence(mode)}",
            ),
            (f"What is {letters} as an octal mode?", f"{letters} is {mode:03o}. {sentence(mode)}"),
            (
                f"ls -l shows -{letters} for {name}. Who may do what?",
                f"The mode is {mode:03o}. {sentence(mode)}",
            ),
            (
                f"Which chmod command gives {name} the mode {letters}?",
                f"chmod {mode:03o} {name}. {sentence(mode)}",
            ),
        ]
    )


def umask(draw):
    """A question about the mode of new files, and its answer."""
    mask = draw.randrange(0o1000)
    file, folder = 0o666 & ~mask, 0o777 & ~mask
    answer = f"New files get {file:03o} ({stat.filemode(file)[1:]}), new folders {folder:03o} "
    answer += (
        f"({stat.filemode(folder)[1:]}): the bits of {mask:03o} are taken away from 666 and 777."
    )
    questions = [
        f"Which permissions do new files and folders get with umask {mask:03o}?",
        f"What does umask {mask:03o} do?",
    ]
    return draw.choice(questions), answer


def clock(hour, minute):
    """A time of day, such as 09:05."""
    return f"{hour:02d}:{minute:02d}"


def cron(draw):
    """A schedule of one of six shapes, and what it means."""
    minute, hour, every = (
        draw.randrange(60),
        draw.randrange(24),
        draw.choice([2, 3, 4, 5, 6, 10, 12, 15, 20, 30]),
    )
    day, month, weekday = draw.randrange(1, 29), draw.randrange(1, 13), draw.randrange(7)
    first = draw.randrange(1, 5)
    last = draw.randrange(first + 1, 7)
    when, meaning = draw.choice(
        [
            (f"{minute} {hour} * * *", f"every day at {clock(hour, minute)}"),
            (f"{minute} {hour} * * {weekday}", f"every {DAYS[weekday]} at {clock(hour, minute)}"),
            (
                f"{minute} {hour} * * {first}-{last}",
                f"from {DAYS[first]} to {DAYS[last]} at {clock(hour, minute)}",
            ),
            (f"{minute} {hour} {day} * *", f"on day {day} of every month at {clock(hour, minute)}"),
            (
                f"{minute} {hour} {day} {month} *",
                f"once a year, on {day} {MONTHS[month - 1]} at {clock(hour, minute)}",
            ),
            (
                f"*/{every} {hour} * * *",
                f"every {every} minutes from {clock(hour, 0)} to {clock(hour, 60 - every)}, "
                "every day",
            ),
            (
                f"{minute} * * * {weekday}",
                f"every hour at minute {minute}, on {DAYS[weekday]}s only",
            ),
        ]
    )
    job = draw.choice(["backup.sh", "report.py", "cleanup.sh", "sync.sh", "mail.py", "rotate.sh"])
    fields = "The fields are minute, hour, day of the month, month, and day of the week."
    return draw.choice(
        [
            (f"When does cron run '{when} {job}'?", f"It runs {job} {meaning}. {fields}"),
            (f"What does the crontab entry {when} mean?", f"It means {meaning}. {fields}"),
            (f"Write a crontab line that runs {job} {meaning}.", f"{when} {job}"),
        ]
    )


def subnet(draw):
    """A question about networks of addresses, and its answer."""
    prefix = draw.randrange(16, 31)
    address = ipaddress.ip_address(
        draw.choice([0x0A000000, 0xC0A80000, 0xAC100000]) + draw.randrange(2**16)
    )
    network = ipaddress.ip_network(f"{address}/{prefix}", strict=False)
    hosts = network.num_addresses - 2
    first, last = network.network_address + 1, network.broadcast_address - 1
    return draw.choice(
        [
            (
                f"Which network does {address}/{prefix} belong to?",
                f"It belongs to {network}, with the mask {network.netmask} and the broadcast "
                "address "
                f"{network.broadcast_address}.",
            ),
            (
                f"How many hosts fit into {network}?",
                f"{hosts:,} hosts, from {first} to {last}: 2 to the power of {32 - prefix} "
                "addresses, without the "
                "network's own and the broadcast address.",
            ),
            (
                f"Are {address} and {address + draw.choice([-9, -4, 3, 7, 40, 120])} "
                f"in one /{prefix} network?",
                None,
            ),
        ]
    )


def same_network(question):
    """The answer to the last question of `subnet`."""
    _, one, _, other, *_, prefix, _ = question.split()
    networks = [
        ipaddress.ip_network(f"{address}{prefix}", strict=False) for address in (one, other)
    ]
    if networks[0] == networks[1]:
        return f"Yes, both are in {networks[0]}."
    return f"No: {one} is in {networks[0]}, {other} in {networks[1]}."


def size(draw):
    """A question about bytes and their units, and its answer."""
    unit = draw.randrange(1, 5)
    number = draw.choice(
        [draw.randrange(2, 1000), draw.choice([1, 2, 4, 8, 16, 32, 64, 128, 256, 512])]
    )
    return draw.choice(
        [
            (
                f"How many {UNITS[unit - 1]} are {number} {UNITS[unit]}?",
                f"{number} {UNITS[unit]} are {number * 1024:,} {UNITS[unit - 1]}: "
                f"{number} times 1,024.",
            ),
            (
                f"How many bytes are {number} {UNITS[unit]}?",
                f"{number} {UNITS[unit]} are {number * 1024**unit:,} bytes: {number} times 1,024"
                + (f" to the power of {unit}." if unit > 1 else "."),
            ),
        ]
    )


def base(draw):
    """A question about a number in another base, and its answer."""
    number = draw.randrange(2, 1024)
    names = {
        "decimal": f"{number}",
        "binary": f"{number:b}",
        "octal": f"{number:o}",
        "hexadecimal": f"{number:x}",
    }
    known, asked = draw.sample(sorted(names), 2)
    powers = " + ".join(str(2**bit) for bit in reversed(range(10)) if number >> bit & 1)
    return (
        f"What is {known} {names[known]} in {asked}?",
        f"{known.capitalize()} {names[known]} is {names[asked]} in {asked}; as powers of two, "
        f"{number} is {powers}.",
    )


def rows(number, seed=0):
    """So many different questions with their answers, dicts."""
    draw, made = random.Random(seed), {}
    kinds = [chmod, chmod, umask, cron, cron, cron, subnet, subnet, size, base]
    while len(made) < number:
        question, answer = draw.choice(kinds)(draw)
        made.setdefault(question, answer or same_network(question))
    return [{"question": question, "answer": answer} for question, answer in made.items()]


if __name__ == "__main__":
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows(5000))
    (Path(__file__).parent / "terminal.jsonl").write_text(lines, encoding="utf-8")
