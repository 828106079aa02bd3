from .component import evaluate as evaluate
