"""The maze as a grid of cells: which are free, where they lie, which routes join them."""

import math
from collections import deque
from collections.abc import Sequence

import numpy as np

Cell = tuple[int, int]  # (row, column); row 0 is the top of the map
Route = tuple[Cell, ...]  # free cells, each a neighbour of the one before, none twice

CELL_M = 1.0


class MazeGrid:
    """Cells of a rectangular maze, with the origin of the metric frame at its centre and y pointing up."""

    def __init__(self, wall_map: Sequence[Sequence[object]]) -> None:
        """Read a map as gymnasium-robotics writes it: rows from top to bottom, 1 for a wall, anything else free."""
        self.rows = len(wall_map)
        self.columns = len(wall_map[0])
        cells = [(row, column) for row in range(self.rows) for column in range(self.columns)]
        self.walls: list[Cell] = [cell for cell in cells if wall_map[cell[0]][cell[1]] == 1]
        self.free: list[Cell] = [cell for cell in cells if wall_map[cell[0]][cell[1]] != 1]
        self._free = frozenset(self.free)
        self._cells_to: dict[Cell, dict[Cell, int]] = {goal: self._flood(goal) for goal in self.free}
        self._routes: dict[tuple[Cell, Cell, int], list[Route]] = {}

    @property
    def size_m(self) -> tuple[float, float]:
        """Width and height of the map, outer walls included."""
        return self.columns * CELL_M, self.rows * CELL_M

    @property
    def wall_blocks(self) -> list[tuple[float, float, float, float]]:
        """Wall cells as (left, bottom, width, height) in metres."""
        corners = [self.centre_of(cell) - CELL_M / 2 for cell in self.walls]
        return [(float(left_m), float(bottom_m), CELL_M, CELL_M) for left_m, bottom_m in corners]

    def centre_of(self, cell: Cell) -> np.ndarray:
        """Return the centre of a cell, (2,) in metres."""
        row, column = cell
        return np.array([(column + 0.5 - self.columns / 2) * CELL_M, (self.rows / 2 - row - 0.5) * CELL_M])

    def cell_of(self, x_m: float, y_m: float) -> Cell:
        """Return the cell that holds a point; it may be a wall, or lie outside the map."""
        return math.floor(self.rows / 2 - y_m / CELL_M), math.floor(x_m / CELL_M + self.columns / 2)

    def is_free(self, cell: Cell) -> bool:
        """Whether a cell is inside the map and no wall."""
        return cell in self._free

    def neighbours(self, cell: Cell) -> list[Cell]:
        """Return the free cells that share an edge with `cell`."""
        row, column = cell
        around = [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
        return [neighbour for neighbour in around if neighbour in self._free]

    def path_cells(self, start: Cell, goal: Cell) -> int:
        """Return the length of the shortest route, counted in moves from cell to cell."""
        return self._cells_to[goal][start]

    def near_shortest_routes(self, start: Cell, goal: Cell, slack_cells: int) -> list[Route]:
        """Return every simple route at most `slack_cells` longer than the shortest, in a fixed order."""
        key = (start, goal, slack_cells)
        if key not in self._routes:
            budget_cells = self.path_cells(start, goal) + slack_cells
            self._routes[key] = self._extend((start,), goal, budget_cells)
        return self._routes[key]

    def _extend(self, route: Route, goal: Cell, budget_cells: int) -> list[Route]:
        here = route[-1]
        if here == goal:
            return [route]
        found: list[Route] = []
        for cell in self.neighbours(here):
            if cell not in route and self.path_cells(cell, goal) < budget_cells:
                found += self._extend((*route, cell), goal, budget_cells - 1)
        return found

    def _flood(self, goal: Cell) -> dict[Cell, int]:
        """Return the distance in cells from every cell that can reach `goal`."""
        cells_to_goal = {goal: 0}
        frontier = deque([goal])
        while frontier:
            cell = frontier.popleft()
            for neighbour in self.neighbours(cell):
                if neighbour not in cells_to_goal:
                    cells_to_goal[neighbour] = cells_to_goal[cell] + 1
                    frontier.append(neighbour)
        return cells_to_goal
