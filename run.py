"""python run.py --gin_file=...: the command, t5x_lite/cli/main.py."""

from t5x_lite.cli.main import command, configure, main, parse_flags

__all__ = ["command", "configure", "main", "parse_flags"]

if __name__ == "__main__":
    command()
