"""A scikit-learn forest by pickle."""

import pickle
from pathlib import Path
from typing import Any

import sklearn.ensemble  # imported here, like the others, so that only loading is timed

PATIENT = [[0.3, 1.1, -0.4, 0.8, 1.9, 0.0, -1.2, 0.6, 0.2, -0.7, 1.4, 0.1, -0.5]]


def load(directory: str) -> Any:
    with (Path(directory) / "best_model.pkl").open("rb") as file:
        return pickle.load(file)


def use(model: sklearn.ensemble.RandomForestClassifier) -> str:
    risk = model.predict_proba(PATIENT)[0][1]
    return f"{type(model).__name__} of {len(model.estimators_)} trees; risk of the patient {risk:.0%}"
