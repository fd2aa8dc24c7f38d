"""What the robot of Meta-World can be told to do: six tasks in three scenes, and their words."""

from dataclasses import dataclass

Box3 = tuple[tuple[float, float, float], tuple[float, float, float]]  # lowest and highest corner, x y z in metres


@dataclass(frozen=True)
class Task:
    """One of Meta-World's own tasks, with the ways to ask for it."""

    name: str
    scene: str
    env: str  # class in `metaworld.envs` that says when the task is done
    expert: str  # class in `metaworld.policies` that does it
    phrases: tuple[str, ...]  # for training
    held_out_phrases: tuple[str, ...]  # never trained on


@dataclass(frozen=True)
class Scene:
    """Where the episodes of two tasks begin.

    Both tasks draw their beginnings from here, so that a picture of the beginning says nothing about the task: only the
    instruction does. The object stands within what Meta-World randomises for both tasks; its joint begins about half
    way, where neither task is done, instead of at the end that Meta-World begins its task from.
    """

    name: str
    tasks: tuple[str, str]
    joint: str  # that the tasks move, one way or the other
    joint_start: tuple[float, float]  # least and most, metres or radians
    object_start: Box3
    hand_start: Box3


_NEAR_HAND = ((-0.08, 0.42, 0.17), (0.08, 0.52, 0.25))

SCENES = {
    scene.name: scene
    for scene in (
        Scene(
            name="drawer",
            tasks=("drawer-open", "drawer-close"),
            joint="goal_slidey",
            joint_start=(-0.12, -0.08),  # open by 8 to 12 cm of 16
            object_start=((-0.1, 0.9, 0.0), (0.1, 0.9, 0.0)),
            hand_start=((-0.08, 0.48, 0.17), (0.08, 0.58, 0.25)),
        ),
        Scene(
            name="faucet",
            tasks=("faucet-open", "faucet-close"),
            joint="knob_Joint_1",
            joint_start=(-0.2, 0.2),  # of a quarter turn either way
            object_start=((-0.05, 0.8, 0.0), (0.05, 0.85, 0.0)),
            hand_start=_NEAR_HAND,
        ),
        Scene(
            name="window",
            tasks=("window-open", "window-close"),
            joint="window_slide",
            joint_start=(0.085, 0.115),  # open by 8.5 to 11.5 cm of 20
            object_start=((-0.1, 0.75, 0.16), (0.1, 0.9, 0.16)),
            hand_start=_NEAR_HAND,
        ),
    )
}

TASKS = {
    task.name: task
    for task in (
        Task(
            name="drawer-open",
            scene="drawer",
            env="SawyerDrawerOpenEnvV3",
            expert="SawyerDrawerOpenV3Policy",
            phrases=(
                "open the drawer",
                "pull the drawer open",
                "pull out the green drawer",
                "slide the drawer out",
                "draw the drawer open by its handle",
                "please open the drawer all the way",
                "pull the white handle of the drawer",
            ),
            held_out_phrases=("get the drawer open", "slide the green drawer open"),
        ),
        Task(
            name="drawer-close",
            scene="drawer",
            env="SawyerDrawerCloseEnvV3",
            expert="SawyerDrawerCloseV3Policy",
            phrases=(
                "close the drawer",
                "push the drawer closed",
                "push in the green drawer",
                "slide the drawer in",
                "shut the drawer by its handle",
                "please close the drawer all the way",
                "push the white handle of the drawer",
            ),
            held_out_phrases=("get the drawer closed", "slide the green drawer shut"),
        ),
        Task(
            name="faucet-open",
            scene="faucet",
            env="SawyerFaucetOpenEnvV3",
            expert="SawyerFaucetOpenV3Policy",
            phrases=(
                "open the faucet",
                "turn the faucet on",
                "turn on the tap",
                "rotate the red handle counterclockwise",
                "push the faucet handle to the right",
                "please open the tap",
                "let the water run",
            ),
            held_out_phrases=("switch the faucet on", "open up the tap"),
        ),
        Task(
            name="faucet-close",
            scene="faucet",
            env="SawyerFaucetCloseEnvV3",
            expert="SawyerFaucetCloseV3Policy",
            phrases=(
                "close the faucet",
                "turn the faucet off",
                "turn off the tap",
                "rotate the red handle clockwise",
                "push the faucet handle to the left",
                "please close the tap",
                "stop the water",
            ),
            held_out_phrases=("switch the faucet off", "shut the tap"),
        ),
        Task(
            name="window-open",
            scene="window",
            env="SawyerWindowOpenEnvV3",
            expert="SawyerWindowOpenV3Policy",
            phrases=(
                "open the window",
                "slide the window open",
                "push the window handle to the right",
                "move the window to its open side",
                "let some air in",
                "please open the window all the way",
                "slide the pane to the right",
            ),
            held_out_phrases=("get the window open", "push the window open"),
        ),
        Task(
            name="window-close",
            scene="window",
            env="SawyerWindowCloseEnvV3",
            expert="SawyerWindowCloseV3Policy",
            phrases=(
                "close the window",
                "slide the window closed",
                "push the window handle to the left",
                "move the window to its closed side",
                "keep the air out",
                "please close the window all the way",
                "slide the pane to the left",
            ),
            held_out_phrases=("get the window closed", "push the window shut"),
        ),
    )
}


def other_task(name: str) -> str:
    """Return the task that shares the scene of `name`.

    Raises:
        KeyError: There is no task of that name.
    """
    first, second = SCENES[TASKS[name].scene].tasks
    return second if name == first else first
