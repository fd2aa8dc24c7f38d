include(${CMAKE_CURRENT_LIST_DIR}/policy_client_dependencies.cmake)
include(${CMAKE_CURRENT_LIST_DIR}/policy_client_targets.cmake)
