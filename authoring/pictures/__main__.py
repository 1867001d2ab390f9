"""python -m authoring.pictures [--check]: write figures/*.svg, or compare them with their code."""

import argparse
import sys

from authoring.pictures import build, outdated


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if one differs")
    if parser.parse_args().check:
        if found := outdated():
            print(f"not what their code draws: {', '.join(found)}")
            print("To draw them again, run: python -m authoring.pictures")
        return 1 if found else 0
    for file in build():
        print(f"figures/{file.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
