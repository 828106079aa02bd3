from .component import prune as prune
