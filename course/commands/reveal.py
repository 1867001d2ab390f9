"""Show the solutions of a lesson's exercises.

course reveal 03                  all of them
course reveal 03 slot_mapping     one
"""

import argparse

from course.checks.exercises import all_places, code_of, lesson_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("lesson", help="its number, such as 03")
    parser.add_argument("exercise", nargs="?", help="one exercise's name (default: all)")


def main(args: argparse.Namespace) -> int:
    lesson = lesson_of(args.lesson)
    exercises = {p.exercise.name: p.exercise for p in all_places() if p.lesson == lesson}
    if args.exercise and args.exercise not in exercises:
        raise ValueError(f"lesson {lesson[:2]} has {', '.join(exercises)}, not {args.exercise!r}")
    for name in [args.exercise] if args.exercise else exercises:
        title = f"# -- {exercises[name].kind}: {exercises[name].title} ({name}) "
        print(f"{title:-<100}\n\n{code_of(lesson, name, 'solutions')}\n")
    print(f"To run them: solutions/{lesson}.ipynb")
    return 0
