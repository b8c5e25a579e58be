"""Which category a subject of C-Eval (Huang et al. 2023) or CMMLU (Li et al. 2023) belongs to, as their authors say.

lm_eval knows the subjects of both, but not the categories; of other benchmarks, such as TMMLU+, it knows these too.
"""

CATEGORIES = {
    "ceval-valid": {
        "STEM": (
            "computer_network operating_system computer_architecture college_programming college_physics "
            "college_chemistry advanced_mathematics probability_and_statistics discrete_mathematics "
            "electrical_engineer metrology_engineer high_school_mathematics high_school_physics "
            "high_school_chemistry high_school_biology middle_school_mathematics middle_school_biology "
            "middle_school_physics middle_school_chemistry veterinary_medicine"
        ),
        "Social Science": (
            "college_economics business_administration marxism mao_zedong_thought education_science "
            "teacher_qualification high_school_politics high_school_geography middle_school_politics "
            "middle_school_geography"
        ),
        "Humanities": (
            "modern_chinese_history ideological_and_moral_cultivation logic law chinese_language_and_literature "
            "art_studies professional_tour_guide legal_professional high_school_chinese high_school_history "
            "middle_school_history"
        ),
        "Other": (
            "civil_servant sports_science plant_protection basic_medicine clinical_medicine "
            "urban_and_rural_planner accountant fire_engineer environmental_impact_assessment_engineer "
            "tax_accountant physician"
        ),
    },
    "cmmlu": {
        "STEM": (
            "anatomy astronomy college_actuarial_science college_engineering_hydrology college_mathematics "
            "college_medical_statistics computer_science conceptual_physics electrical_engineering "
            "elementary_mathematics genetics high_school_biology high_school_chemistry high_school_mathematics "
            "high_school_physics machine_learning virology"
        ),
        "Humanities": (
            "arts chinese_history chinese_literature college_law global_facts international_law jurisprudence "
            "logical marxist_theory philosophy professional_law world_history world_religions"
        ),
        "Social Science": (
            "ancient_chinese business_ethics chinese_civil_service_exam chinese_food_culture "
            "chinese_foreign_policy chinese_teacher_qualification college_education economics education "
            "elementary_chinese ethnology high_school_geography high_school_politics journalism management "
            "marketing modern_chinese professional_accounting professional_psychology public_relations "
            "security_study sociology"
        ),
        "Other": (
            "agronomy chinese_driving_rule clinical_knowledge college_medicine computer_security "
            "construction_project_management elementary_commonsense elementary_information_and_technology "
            "food_science human_sexuality legal_and_moral_basis nutrition professional_medicine sports_science "
            "traditional_chinese_medicine"
        ),
    },
}


def category_of(benchmark: str, subject: str) -> str:
    """The category of a subject, '' where none is known."""
    for category, subjects in CATEGORIES.get(benchmark, {}).items():
        if subject in subjects.split():
            return category
    return ""
